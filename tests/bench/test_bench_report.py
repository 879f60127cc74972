"""Reports, plots and the README's table: what they show is what the results say."""

from pathlib import Path

import pytest

from bench import plots, readme_table, report
from bench.__main__ import main
from bench.predict_steps import Step
from bench.results import RESULTS, Ceilings, Result, Row, complete_case, write_result
from osp_fast.errors import UserError

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA H100 80GB HBM3"
LIMITS = Ceilings(800e12, 3e12)
SHAPE = {"batch": 1, "tokens": 38400, "heads": 24, "head_dim": 96, "mode": "group", "sparse_n": 4}
ATTENTION = "skiparse_attention 93x640x640 group forward"
STEP = Step("train", "training step", "93x640x640", {"products": 1.0, "attention": 3.0}, 3.5, 2.0, 1e15)


def env_of(device, **more):
    env = {"device": device, "torch": "2.13", "triton": "3.7.1", "cuda": "13.0", "cudnn": 9, "driver": "580"}
    env |= {"git": "abc", "date": "2026-12-01T00:00:00", "matmul_tflops": 800.0, "copy_tbps": 3.0, "cpu": "Z80"}
    return env | {"threads": 1} | more


def rows_of(case, suite="kernels", **milliseconds):
    roles = {"osp_fast": "ours", "reference": "reference", "strong": "strong"}
    rows = []
    for name, ms in milliseconds.items():
        row = Row(suite, case, name, roles.get(name, "peer"), "bfloat16", dict(SHAPE), ok=ms is not None, ms=ms)
        row.ms_p20 = row.ms_p80 = ms
        row.flops, row.moved = 3.4e12, 0.7e9
        rows.append(row)
    complete_case(rows, LIMITS)
    return rows


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CLIPS", ("93x640x640",))
    monkeypatch.setattr(report, "predict_steps", lambda clip: [STEP])
    rows = rows_of(ATTENTION, osp_fast=8.0, reference=24.0, strong=12.0, flex=10.0)
    rows += rows_of("93x640x640", "train", osp_fast=2000.0, reference=None, strong=1500.0)
    rows[5].note = "out of memory"
    write_result(tmp_path / "nvidia-h100-80gb-hbm3/a-001.json", Result(env_of(GPU), rows))
    slower = [*rows_of("tiny", "sample", osp_fast=4.0, reference=8.0), *rows_of("tiny", "train", osp_fast=2, strong=1)]
    write_result(tmp_path / "cpu/b-001.json", Result(env_of("cpu"), slower))
    return tmp_path


def test_a_report_of_each_device(results, toy, capsys):
    assert main(["report", "--results", str(results)], toy.load) == 0
    folder = results / "nvidia-h100-80gb-hbm3"
    assert {path.name for path in folder.iterdir()} == {"a-001.json", "report.md", *IMAGES}
    text = (folder / "report.md").read_text()
    assert "- train 93x640x640: strong needs 0.75 of our time" in text and "skiparse" not in text.split("![")[0]
    assert f"| {ATTENTION} | reference | 3.00 | 24.00 ms | 0.0 % | 142 | 29 | 17.7 % |" in text
    assert "out of memory" in text and "commit abc: copy 3000 GB/s, bf16 matrix product 800 TFLOP/s" in text
    cpu = (results / "cpu/report.md").read_text()
    assert "| tiny | reference | 2.00 | 0.0 % |" in cpu and " ms" not in cpu
    assert not list((results / "cpu").glob("*.png")) and not (results / "predicted").exists()


IMAGES = ("roofline.png", "attention.png", "steps.png")


def test_predictions_where_no_gpu_has_results(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CLIPS", ("93x640x640",))
    monkeypatch.setattr(report, "predict_steps", lambda clip: [STEP])
    assert main(["report", "--results", str(tmp_path)], toy.load) == 0
    text = (tmp_path / "predicted/report.md").read_text()
    assert text.startswith("# Predicted, not yet measured on a GPU") and "| toy | square | forward |" in text
    assert (tmp_path / "predicted/roofline.png").stat().st_size > 5000
    for arguments, words in ((["--device", "tpu"], "has no results"), (["--results", "nowhere"], "no such folder")):
        with pytest.raises(UserError, match=words):
            main(["report", "--results", str(tmp_path), *arguments], toy.load)


def test_the_roofline_shows_ours_and_the_best_of_the_others():
    points = plots.roofline_points([*rows_of(ATTENTION, osp_fast=8.0, a=24.0, b=12.0, wrong=None)])
    assert [(point.op, point.ours) for point in points] == [("skiparse_attention", True), ("skiparse_attention", False)]
    assert [point.tflops for point in points] == pytest.approx([425.0, 3.4e12 / 12e-3 / 1e12])
    (axes,) = plots.roofline(points, LIMITS, "title").axes
    drawn = [tuple(offset) for scatter in axes.collections for offset in scatter.get_offsets()]
    assert drawn == [(point.intensity, pytest.approx(point.tflops)) for point in points]
    xs, ys = axes.lines[0].get_data()
    assert max(ys) == 800 and all(y == pytest.approx(min(3.0 * x, 800)) for x, y in zip(xs, ys, strict=True))
    faces = [tuple(scatter.get_facecolors().flatten()) for scatter in axes.collections]
    assert faces[0] and not faces[1]  # ours filled, the other hollow


def test_attention_over_tokens():
    rows = rows_of(ATTENTION, osp_fast=8.0, a=24.0)
    more = rows_of("skiparse_attention 93x352x640 group forward", osp_fast=4.0)
    more[0].shape["tokens"] = 21120
    backward = rows_of(ATTENTION.replace("forward", "backward"), osp_fast=20.0)
    cross = rows_of("skiparse_attention 93x640x640 cross forward", osp_fast=1.0)
    cross[0].shape["keys"] = 512
    lines = plots.attention_lines([*rows, *more, *backward, *cross])
    assert {(line.name, line.direction): line.points for line in lines} == {
        ("osp_fast", "forward"): ((21120, pytest.approx(850)), (38400, pytest.approx(425))),
        ("a", "forward"): ((38400, pytest.approx(3.4e3 / 24)),),
        ("osp_fast", "backward"): ((38400, pytest.approx(170)),),
    }
    forward, backward = plots.attention(lines, LIMITS, "title").axes
    drawn = {line.get_label(): line.get_ydata() for line in forward.lines[:-1]}
    assert list(drawn) == ["osp_fast, group", "a, group"] and list(drawn["osp_fast, group"]) == pytest.approx(
        [850, 425]
    )
    assert len(backward.lines) == 2 and forward.get_title() == "forward"


def test_steps_by_their_parts_and_as_measured():
    figure = plots.steps([STEP], {("train", "93x640x640"): 5.0}, "title")
    training, denoising = figure.axes
    assert [bar.get_height() for bar in training.patches] == [25.0, 75.0] and not denoising.patches
    assert [bar.get_y() for bar in training.patches] == [0.0, 25.0]
    assert training.texts[0].get_text() == "4 s\nmeasured\n5 s"


def test_plots_need_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "osp_fast\[bench\]"'):
        plots.steps([STEP], {}, "title")


def test_the_table_of_the_readme_has_losses_in_bold(results, toy, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_table.BEGIN}\noutdated\n{readme_table.END}\nafter\n")
    assert main(["report", "--results", str(results), "--device", "cpu", "--readme", str(readme)], toy.load) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "outdated" not in text
    assert f"{GPU}, 2026-12-01, commit abc, torch 2.13, Triton 3.7.1; a matrix product 800 TFLOP/s" in text
    assert "| 8.000 ms | 53.1 % | 24.00 ms | 12.00 ms | flex, 10.00 ms | 1.25 |" in text
    assert "| train 93x640x640 | 2000.00 ms |" in text and "| **out of memory** | 1500.00 ms |" in text
    assert "| strong, 1500.00 ms | **0.75** |" in text and "2 cases measured, 1 of them lost" in text
    assert "| train tiny | - | 0.50 | strong | **0.50** |" in text and "| sample tiny | 2.00 |" in text
    readme.write_text("no place")
    with pytest.raises(UserError, match="has no lines <!-- bench results -->"):
        readme_table.write_readme(readme, results)


def test_the_table_of_this_readme_is_that_of_the_results():
    """`python -m bench report --readme README.md` writes it anew."""
    text = (ROOT / "README.md").read_text()
    assert readme_table.with_block(text, readme_table.readme_block(RESULTS), ROOT / "README.md") == text
    assert text.count(readme_table.BEGIN) == 1
