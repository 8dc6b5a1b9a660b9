"""What a tap's Triton kernels take on a GPU, beside the bytes that must move, and beside torch.

    python tests/bench/kernel_time.py [--width 4096] [--features 64 1024] [--tokens 1 8 64 512 8192]

A step of T tokens in bfloat16 with a residual, in a CUDA graph, unsteered and with every token
steered (64 policies of three clamps each, capped). A graph holds as many sites as exceed the L2
cache, each with weights and a stream of its own: those of a served model are not in the cache.
``floor`` is the least the memory allows: ``W_enc``, stream and activations (steered: the stream
again, the changes and three rows of ``W_dec`` a policy) at the bandwidth that a copy reaches here.
Prints Markdown. The torch path is the equation of ``reference`` over every token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from steerscope.engine import kernels, reference
from steerscope.engine.reference import Encoder, Rows
from torch import Tensor

NUM_POLICIES, EDITS = 64, 3
PAST_CACHE_BYTES = 256 << 20
MAX_SITES = 64
REPLAYS = 30
INF = float("inf")


@dataclass(frozen=True)
class Site:
    """One site's weights and buffers, and the stream it reads."""

    hidden_TD: Tensor
    residual_TD: Tensor
    encoder: Encoder
    W_dec_FD: Tensor
    mine_F: Tensor
    rows: Rows
    rows_T: Tensor
    acts_TF: Tensor
    deltas_TF: Tensor
    doses_T: Tensor
    scratch: Tensor

    def run_kernels(self) -> None:
        """The path under test."""
        kernels.encode_and_edit(
            self.hidden_TD,
            self.residual_TD,
            self.encoder,
            self.rows,
            self.rows_T,
            self.acts_TF,
            self.deltas_TF,
            self.doses_T,
            self.scratch,
        )
        kernels.land(
            self.hidden_TD,
            self.residual_TD,
            self.W_dec_FD,
            self.mine_F,
            self.rows.max_dose,
            self.rows_T,
            self.deltas_TF,
            self.doses_T,
        )

    def run_torch(self) -> None:
        """The same in torch: every token takes the whole path, as a captured graph must."""
        x_TD = self.hidden_TD.float() + self.residual_TD.float()
        self.acts_TF.copy_(reference.encode(x_TD, self.encoder))
        rows_TF = self.rows.at(self.rows_T)
        delta_TF = reference.edit(self.acts_TF, rows_TF)
        written = reference.decode(delta_TF, self.W_dec_FD, x_TD, rows_TF.max_dose)
        steered_TD = (self.hidden_TD.float() + written.delta_TD).to(self.hidden_TD.dtype)
        neutral_T1 = (self.rows_T == reference.NEUTRAL_ROW).unsqueeze(1)
        self.hidden_TD.copy_(torch.where(neutral_T1, self.hidden_TD, steered_TD))
        self.deltas_TF.copy_(torch.where(self.mine_F, delta_TF * written.share_T1, delta_TF))
        self.doses_T.copy_(written.dose_T)


def build(T: int, D: int, F: int, is_steered: bool) -> Site:
    """Random weights, and policies that clamp ``EDITS`` features each."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    def table(value: float) -> Tensor:
        return torch.full((NUM_POLICIES + 1, F), value, device="cuda")

    lo, hi = table(-INF), table(INF)
    for policy in range(1, NUM_POLICIES + 1):
        features = torch.randperm(F, device="cuda")[:EDITS]
        lo[policy, features] = hi[policy, features] = 2.0
    rows_T = torch.arange(T, device="cuda") % NUM_POLICIES + 1 if is_steered else None
    return Site(
        hidden_TD=normal(T, D).bfloat16(),
        residual_TD=normal(T, D).bfloat16(),
        encoder=Encoder(normal(D, F) / D**0.5, normal(F), torch.zeros(F, device="cuda")),
        W_dec_FD=normal(F, D) / D**0.5,
        mine_F=torch.ones(F, dtype=torch.bool, device="cuda"),
        rows=Rows(
            scale=table(1.0),
            add=table(0.0),
            lo=lo,
            hi=hi,
            self_above=table(-INF),
            gate_index=torch.arange(F, device="cuda").expand(NUM_POLICIES + 1, F).contiguous(),
            gate_above=table(-INF),
            gate_below=table(INF),
            max_dose=torch.full((NUM_POLICIES + 1, 1), 0.1, device="cuda"),
        ),
        rows_T=torch.zeros(T, dtype=torch.int64, device="cuda") if rows_T is None else rows_T,
        acts_TF=torch.zeros(T, F, device="cuda"),
        deltas_TF=torch.zeros(T, F, device="cuda"),
        doses_T=torch.zeros(T, device="cuda"),
        scratch=torch.zeros(kernels.scratch_shape(T, D, F), device="cuda"),
    )


def bytes_moved(T: int, D: int, F: int, is_steered: bool) -> int:
    """The least that a step must read and write."""
    read = 4 * D * F + 2 * 2 * T * D + 4 * T * F
    written = 2 * T * D + 4 * T * F + 4 * D * min(EDITS * NUM_POLICIES, EDITS * T, F)
    return read + (written if is_steered else 0)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call: the median of many replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    spent = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(spent)


def copy_bytes_per_microsecond() -> float:
    """Read and written, of a copy far larger than the cache."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)])


def difference(T: int, D: int, F: int) -> float:
    """Between the two paths' streams, of the larger of the two at its largest."""
    torch.manual_seed(0)
    ours = build(T, D, F, True)
    torch.manual_seed(0)
    theirs = build(T, D, F, True)
    ours.run_kernels()
    theirs.run_torch()
    apart = (ours.hidden_TD.float() - theirs.hidden_TD.float()).abs().max()
    return float(apart / theirs.hidden_TD.float().abs().max())


def row(T: int, D: int, F: int, is_steered: bool, bandwidth: float) -> str:
    """A line of the table."""
    moved = bytes_moved(T, D, F, is_steered)
    count = min(max(-(-PAST_CACHE_BYTES // moved), 1), MAX_SITES)
    sites = [build(T, D, F, is_steered) for _ in range(count)]
    ours = microseconds([site.run_kernels for site in sites])
    theirs = microseconds([site.run_torch for site in sites])
    floor = moved / bandwidth
    cells = (T, F, "all" if is_steered else "none", f"{floor:.2f}", f"{ours:.1f}")
    rest = (f"{theirs:.1f}", f"{ours / floor:.1f}", f"{theirs / ours:.1f}")
    return "| " + " | ".join(str(cell) for cell in (*cells, *rest)) + " |"


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 8192])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernel_time: needs a CUDA device, and there is none", file=sys.stderr)
        return 1
    if not kernels.runs_on(torch.device("cuda")):
        print("kernel_time: needs Triton, which is not installed", file=sys.stderr)
        return 1
    bandwidth = copy_bytes_per_microsecond()
    one = torch.zeros(1, device="cuda")
    launch = microseconds([lambda: one.add_(1)] * MAX_SITES)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {kernels.triton.__version__}, ", end="")
    print(f"width {arguments.width}, bfloat16; a copy moves {bandwidth / 1e6:.2f} TB/s, ", end="")
    print(f"a kernel in a graph that does nothing to speak of takes {launch:.2f} µs.\n")
    print("| tokens | features | steered | floor µs | kernels µs | torch µs ", end="")
    print("| kernels / floor | torch / kernels |\n" + "| --- " * 8 + "|")
    for F in arguments.features:
        for T in arguments.tokens:
            for is_steered in (False, True):
                print(row(T, arguments.width, F, is_steered, bandwidth), flush=True)
    apart = max(difference(64, arguments.width, F) for F in arguments.features)
    print(f"\nStreams of the two paths, 64 steered tokens: at most {apart:.1e} apart, relatively.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
