"""What is wrong with a measured row, in sentences that begin with the kind of fault: noisy, throttled, refused ..."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from bench.measure.clock import Sample
from bench.measure.rounds import STABLE_WITHIN
from bench.measure.stats import SUM_WITHIN, Estimate, drift, spread

NOISY_CV = 0.05
DRIFT_SHARE = 0.05
DRIFT_P = 0.01
ENQUEUE_SHARE = 0.5
OTHERS_CPU_PERCENT = 20


def sample_faults(samples: Sequence[Sample], *, floor_ms: float | None, unsettled: float | None) -> list[str]:
    """Everything that the samples show; an empty list means that nothing was found.

    `floor_ms` is the roofline floor of one call on this machine, `unsettled` the share by which the last two calls of
    the warm-up differed.
    """
    totals_ms = [sample.total_ms for sample in samples]
    total_ms = median(totals_ms)
    waits = [sample.enqueue_bound for sample in samples if sample.enqueue_bound is not None]
    unaccounted = max(sample.unaccounted for sample in samples)
    faults = []
    if floor_ms is not None and total_ms < floor_ms:
        faults.append(
            f"refused: {total_ms:.1f} ms is faster than the roofline floor of {floor_ms:.1f} ms; this is no result"
        )
    if unaccounted > SUM_WITHIN:
        faults.append(f"unexplained: stages leave {unaccounted:.1%} of the total (allowed 1 %)")
    if unsettled is not None and unsettled > STABLE_WITHIN:
        faults.append(f"not warmed up: the last two calls of the warm-up still differed by {unsettled:.0%}")
    if (cv := spread(totals_ms)) > NOISY_CV:
        faults.append(f"noisy: samples vary by {cv:.0%} (coefficient of variation, 5 % is calm)")
    share, p_value = drift(totals_ms)
    if abs(share) > DRIFT_SHARE and p_value < DRIFT_P:
        faults.append(f"drifting: {'slower' if share > 0 else 'faster'} by {abs(share):.0%} from first to last round")
    if waits and (share := median(waits)) > ENQUEUE_SHARE:
        faults.append(
            f"enqueue-bound: for {share:.0%} of the denoising the device waited for the host to launch its work"
        )
    for reason, count in Counter(reason for sample in samples for reason in sample.throttled).items():
        faults.append(f"throttled: {reason} in {count} of {len(samples)} calls")
    return faults


def machine_faults(
    *,
    others_cpu_percent: float | None = None,
    other_gpu_processes: int = 0,
) -> list[str]:
    """What the machine showed while the samples were taken; `others_cpu_percent` is of one core."""
    faults = []
    if other_gpu_processes:
        faults.append(f"not alone: {other_gpu_processes} other process(es) on the GPU")
    if others_cpu_percent is not None and others_cpu_percent > OTHERS_CPU_PERCENT:
        faults.append(f"not alone: other processes used {others_cpu_percent:.0f} % of one core meanwhile")
    return faults


def eight_bit_faults(precision: str, gain: Estimate | None) -> list[str]:
    """A UNet in 8 bits that is slower than the same in half precision; `gain` says how many times faster it is. Where it
    has an interval, all of that must lie below 1."""
    if gain is None or (gain.value if gain.high is None else gain.high) >= 1:
        return []
    return [f"slower in {precision}: {gain.value:.2f} times as fast as without; draw this workload in half precision"]


def picture_faults(found: Sequence[str]) -> list[str]:
    """What is visibly wrong with the pictures refuses the row."""
    return [f"refused: {fault}; this is no result" for fault in found]


def are_doubts(faults: Sequence[str]) -> bool:
    """Whether any of them makes the figure doubtful. A contestant is enqueue-bound, or slow in 8 bits, by nature."""
    return any(not fault.startswith(("enqueue-bound", "slower in")) for fault in faults)


def is_refused(faults: Sequence[str]) -> bool:
    """Whether the row is no result at all."""
    return any(fault.startswith("refused") for fault in faults)
