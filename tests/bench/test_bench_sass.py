"""Instructions and loops of machine code, on listings written out here as cuobjdump prints them."""

from bench.sass import access_widths, count_classes, innermost_loops, parse_functions, register_splits


def listing(*lines):
    """A function with one instruction per line, addresses 16 apart, "name:" marks a target, {name} stands for it."""
    targets, code = {}, []
    for line in lines:
        if line.endswith(":"):
            targets[line[:-1]] = f"{16 * len(code):#x}"
        else:
            code.append(line)
    text = '\tcode for sm_90a\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    for place, line in enumerate(code):
        text += f"        /*{16 * place:04x}*/                   {line.format(**targets)} ;"
        text += "        /* 0x00000a00ff017b82 */\n" + " " * 60 + "/* 0x000e620000000800 */\n"
    return text


def loops_of(*lines):
    (function,) = parse_functions(listing(*lines))
    return [[instruction.opcode for instruction in loop] for loop in innermost_loops(function)]


def test_instructions_are_parsed():
    (function,) = parse_functions(
        listing("LDC R1, c[0x0][0x28]", "@!P0 BRA {end}", "LDG.E.128 R4, [R2]", "end:", "EXIT")
    )
    assert [(i.address, i.guard, i.opcode) for i in function] == [
        (0x0, "", "LDC"),
        (0x10, "@!P0", "BRA"),
        (0x20, "", "LDG.E.128"),
        (0x30, "", "EXIT"),
    ]
    assert function[1].operands == "0x30"


def test_functions_are_told_apart():
    first, second = parse_functions(listing("EXIT") + listing("NOP", "EXIT"))
    assert (len(first), len(second)) == (1, 2)


def test_classes_count_opcodes_and_not_their_prefixes():
    (function,) = parse_functions(
        listing(
            "LDG.E.128 R4, [R2]",
            "LDGSTS.E.BYPASS.128 [R4], [R2]",
            "LDGDEPBAR",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",
            "MUFU.EX2 R1, R2",
            "MUFU.RCP R1, R2",
            "REDUX.SUM UR1, R2",
            "RED.E.ADD.F32 [R2], R3",
            "BAR.SYNC.DEFER_BLOCKING 0x0",
            "STL.64 [R1], R2",
            "LDL.LU R2, [R1]",
        )
    )
    counts = {name: count for name, count in count_classes(function).items() if count}
    once = ("LDG", "LDGSTS", "HGMMA", "MUFU.EX2", "RED", "BAR", "STL", "LDL")
    assert counts == {**dict.fromkeys(once, 1), "total": 11}


def test_widths_of_accesses_to_global_memory():
    (function,) = parse_functions(
        listing(
            "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
            "LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64]",
            "STG.E.128 desc[UR4][R2.64], R4",
            "LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]",
            "LDG.E.64 R4, [R2]",
            "@P0 LDG.E R4, [R2]",
            "LDGSTS.E [R4], [R2]",
            "LDG.E.U16 R4, [R2]",
            "STG.E.U8 [R2], R4",
            "LDS.128 R4, [R2]",
            "LDGDEPBAR",
            "STL.64 [R1], R2",
        )
    )
    assert access_widths(function) == {"32": 1, "16": 3, "8": 1, "4": 2, "2": 1, "1": 1}


def test_straight_code_and_the_trap_at_its_end_are_no_loops():
    assert loops_of("LDG R1, [R2]", "EXIT", "trap:", "BRA {trap}") == []


def test_only_the_innermost_loop_counts():
    outer = ("outer:", "LDG R1, [R2]", "inner:", "HMMA.16816.F32 R1, R2, R3", "@P0 BRA {inner}", "STG [R2], R1")
    assert loops_of(*outer, "@P1 BRA {outer}", "EXIT") == [["HMMA.16816.F32", "BRA"]]


def test_two_loops_in_one_are_two():
    loops = loops_of(
        "outer:", "first:", "HMMA R1, R2", "@P0 BRA {first}", "second:", "LDG R1, [R2]", "@P1 BRA {second}",
        "@P2 BRA {outer}", "EXIT",
    )  # fmt: skip
    assert loops == [["HMMA", "BRA"], ["LDG", "BRA"]]


def test_the_slow_path_of_a_wait_is_part_of_its_loop_and_code_between_is_not():
    """The retry of a barrier lies behind the function's end: it jumps back, and is itself a loop that only waits."""
    loops = loops_of(
        "loop:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R6", "@!P0 BRA {slow}", "go:", "HGMMA.64x64x16 R1, R2",
        "UTMALDG.2D [UR8]", "@!P1 BRA {loop}", "STG [R2], R1", "EXIT",
        "slow:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R6", "@!P0 BRA {slow}", "BRA {go}",
    )  # fmt: skip
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA"]
    assert loops == [[*wait, "HGMMA.64x64x16", "UTMALDG.2D", "BRA", *wait, "BRA"]]


def test_waiting_for_registers_is_no_loop():
    assert loops_of("again:", "USETMAXREG.TRY_ALLOC.CTAPOOL UP2, 0xf0", "BRA.U !UP2, {again}", "EXIT") == []


def test_loops_of_warp_groups_behind_an_indirect_branch():
    """A dispatcher jumps through a table, whose targets the listing does not name, and groups jump back to it."""
    loops = loops_of(
        "dispatch:", "BAR.SYNC 0x1", "BRX R2 -0x1a0",
        "USETMAXREG.DEALLOC.CTAPOOL 0x18", "load:", "UTMALDG.2D [UR8]", "BRA.U !UP2, {load}", "BRA {dispatch}",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "multiply:", "HGMMA R1, R2", "BRA.U !UP2, {multiply}", "EXIT",
    )  # fmt: skip
    assert loops == [["UTMALDG.2D", "BRA.U"], ["HGMMA", "BRA.U"]]


def test_a_long_jump_out_of_a_loop_is_written_as_a_call():
    loops = loops_of("loop:", "HMMA R1, R2", "@P1 CALL.REL.NOINC {out}", "BRA {loop}", "out:", "STG [R2], R1", "EXIT")
    assert loops == [["HMMA", "CALL.REL.NOINC", "BRA"]]


def test_register_splits():
    (function,) = parse_functions(
        listing("USETMAXREG.DEALLOC.CTAPOOL 0x18", "USETMAXREG.TRY_ALLOC.CTAPOOL UP2, 0xf0", "USETMAXREG 0x18", "EXIT")
    )
    assert register_splits(function) == [24, 240]
