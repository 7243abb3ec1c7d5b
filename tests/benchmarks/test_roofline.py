"""Bytes and FLOPs of each kernel against numbers that were worked out by hand, and what a time means for them."""

import bench
import pytest
import roofline
import torch
from roofline import Work

FORWARD, BOTH = "forward", "forward+backward"


def test_pairs_of_a_window_with_sinks_are_those_of_its_mask():
    T, W, S = 11, 4, 2
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    assert roofline.pairs(T, W, S) == int(((s <= t) & ((t - s < W) | (s < S))).sum()) == 51
    assert roofline.pairs(T, T, 0) == 66


@pytest.mark.parametrize(
    "work, bytes, flops",
    [
        # 2 rows, 3 tokens, 4 heads on 2 groups, K 8, V 16: q 32, k 16, v 32, h 64 entries a token
        (roofline.attention(2, 3, 4, 2, 8, 16, 2, 0, 2), 2 * 3 * 144 * 2, 2 * (2 * 4) * 5 * 24),
        # and h's gradient 64, dq 32, dk 16, dv 32; five products of which three are along K
        (roofline.attention(2, 3, 4, 2, 8, 16, 2, 0, 2, True), 2 * 3 * 288 * 2, 2 * (2 * 4) * 5 * 56),
        # 5 tokens in chunks of 2: 3 + 3 + 1 pairs; q, k, v, h, i, f: 50 entries a token
        (roofline.mlstm(1, 5, 3, 8, 16, 4, L=2), 5 * 3 * 50 * 4, 2 * 3 * (7 * 24 + 5 * 2 * 128)),
        (roofline.mlstm(1, 5, 3, 8, 16, 4, True, L=2), 5 * 3 * 100 * 4, 2 * 3 * (7 * 56 + 5 * 5 * 128)),
        (roofline.mixed(1, 5, 3, 16, 2), 5 * 3 * 49 * 2, 5 * 3 * 48),
        (roofline.features(1, 5, 3, 8, 2), (2 * 2 * 120 + 2 * 192) * 2, 2 * 2 * 5 * 3 * 64),
        # 10 slots of 2 groups, the new key and value read and written, q and h
        (roofline.step_window(1, 4, 2, 8, 16, 10, 2), (480 + 96 + 96) * 2, 2 * 4 * 10 * 24),
        # C, n, m in and out in float32
        (roofline.step_memory(1, 4, 8, 16, 2), 4 * (50 * 2 + 2 * 137 * 4), 5 * 4 * 128),
        # hidden in, its gradient out, the head in, its gradient out in float32; ids and log-probabilities of 4 entries
        (roofline.head_loss(10, 8, 100, 4, 2), (160 + 800) * 2 + 10 * 60 + 3200, 3 * 2 * 10 * 8 * 100),
        (roofline.head_loss(10, 8, 100, 4, 2, frozen=True), (160 + 800) * 2 + 10 * 60, 2 * 2 * 10 * 8 * 100),
    ],
)
def test_the_work_of_a_kernel_is_counted_from_its_shapes(work, bytes, flops):
    assert (work.bytes, work.flops) == (bytes, flops)


def test_a_layer_is_the_sum_of_its_parts_and_what_nobody_counts_has_none():
    sizes = {"B": 1, "T": 9, "H": 2, "d": 8, "W": 4, "S": 1, "size": 4}
    one = lambda name, backward=False: roofline.sequence(name, **sizes, backward=backward)  # noqa: E731
    mix, maps = roofline.mixed(1, 9, 2, 8, 4), roofline.features(1, 9, 2, 8, 4)
    assert one("hybrid") == Work.of([one("window"), one("mlstm"), mix])
    assert one("layer") == Work.of([one("hybrid"), maps])
    assert one("sdpa flash").flops == 2 * 2 * 45 * 16 and one("native") is None
    assert one("window", True) == Work.of([one("window"), roofline.attention(1, 9, 2, 2, 8, 8, 4, 1, 4, True)])
    assert roofline.decode("growing", 1, 9, 2, 8, 4, 1, 4) is None


def test_on_a_known_device_the_share_of_its_roofline_is_told():
    peak = roofline.peak_of("NVIDIA H200", 2)
    assert peak == (4.3e12, 790e12) and roofline.peak_of("NVIDIA H200", 4) is None and roofline.peak_of("", 2) is None
    memory, compute = Work(int(4.3e9), int(1e9)), Work(1000, int(790e9))
    assert memory.roofline(peak) == pytest.approx(1e-3) and compute.roofline(peak) == pytest.approx(1e-3)
    assert memory.figures(2e-3, peak) == {
        "bytes": int(4.3e9),
        "flops": int(1e9),
        "GB/s": 2150.0,
        "GFLOP/s": 500.0,
        "roofline": 0.5,
    }
    # the target's shapes: mLSTM forward (8, 16, 8192), d 128, is bound by memory: 0.25 ms at least
    target = roofline.mlstm(8, 8192, 16, 128, 128, 2)
    assert target.roofline(peak) == pytest.approx(target.bytes / 4.3e12) and 2.4e-4 < target.roofline(peak) < 2.6e-4


def test_a_row_of_the_benchmark_has_it_and_the_table_shows_it(monkeypatch, capsys):
    times = {"sdpa": [2.0], "window": [1.0], "masked": [3.0]}
    row = bench.row("sequence", FORWARD, 64, 16, times, "sdpa")
    work = roofline.attention(bench.HERE.B, 64, bench.HERE.H, bench.HERE.H, 16, 16, 512, 4, 4)
    assert row["work"].keys() == {"sdpa", "window"} and row["work"]["window"] == work.figures(1e-3)
    assert "roofline" not in row["work"]["window"]
    bench.show(row)
    assert f"window {work.bytes / 1e6:.3g} GB/s, {work.flops / 1e6:.3g} GFLOP/s" in capsys.readouterr().out
    monkeypatch.setattr(bench, "HERE", bench.SETTINGS["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    row = bench.row("sequence", BOTH, 64, 16, times, "sdpa")
    bench.show(row)
    assert f"{row['work']['window']['roofline']:.0%} of the roofline" in capsys.readouterr().out
