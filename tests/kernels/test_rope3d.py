"""3D RoPE against its formula."""

import pytest
import torch
from osp_fast.kernels.rope3d import rope3d_ref, rope3d_table


def test_angles_follow_the_formula():
    cos, sin = rope3d_table((2, 3, 4), 24, (1.0, 2.0, 0.5))
    assert cos.shape == sin.shape == (24, 3, 4)
    for t in range(2):
        for y in range(3):
            for x in range(4):
                for axis, position in enumerate((t / 1.0, y / 2.0, x / 0.5)):
                    for i in range(4):
                        angle = torch.tensor(position * 10000 ** (-2 * i / 8), dtype=torch.float64)
                        token = (t * 3 + y) * 4 + x
                        assert abs(cos[token, axis, i] - angle.cos()) < 1e-6
                        assert abs(sin[token, axis, i] - angle.sin()) < 1e-6


def test_rotation_by_halves_in_each_part():
    table = rope3d_table((3, 2, 2), 18)
    x = torch.randn(2, 12, 2, 18, dtype=torch.float64)
    out = rope3d_ref(x, *table)
    for part in range(3):
        first, second = x[..., part * 6 : part * 6 + 3], x[..., part * 6 + 3 : part * 6 + 6]
        cos, sin = (values[:, part, None].double() for values in table)
        assert torch.allclose(out[..., part * 6 : part * 6 + 3], first * cos - second * sin)
        assert torch.allclose(out[..., part * 6 + 3 : part * 6 + 6], second * cos + first * sin)


def test_products_depend_on_relative_positions_only():
    cos, sin = rope3d_table((6, 1, 1), 12)
    q, k = torch.randn(12), torch.randn(12)
    q_at, k_at = (rope3d_ref(x.expand(1, 6, 1, 12), cos, sin)[0, :, 0] for x in (q, k))
    products = q_at @ k_at.T
    assert torch.allclose(products.diagonal(2), products[0, 2].expand(4), atol=1e-5)


def test_type_and_rounding():
    x = torch.randn(1, 8, 1, 12, dtype=torch.bfloat16)
    exact, rounded = rope3d_table((2, 2, 2), 12), rope3d_table((2, 2, 2), 12, round_to=torch.bfloat16)
    assert exact[0].dtype == torch.float32 and rounded[0].dtype == torch.bfloat16
    assert rope3d_ref(x, *exact).dtype == torch.bfloat16
    # The rounding reaches the angle itself: at position 300 it is off by up to one.
    exact, rounded = rope3d_table((301, 1, 1), 12), rope3d_table((301, 1, 1), 12, round_to=torch.bfloat16)
    angle = torch.tensor(299.0).to(torch.bfloat16)
    assert rounded[0][299, 0, 0] == angle.cos() and abs(exact[0][299, 0, 0] - torch.tensor(299.0).cos()) < 1e-6


def test_head_dimension_must_divide():
    with pytest.raises(ValueError, match="multiple of 6"):
        rope3d_table((1, 1, 1), 64)
