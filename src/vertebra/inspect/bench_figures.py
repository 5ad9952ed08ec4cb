"""What `bench` reports and how: columns, figures from paired times, and what a table gains beside an earlier one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import peers

Row = dict[str, Any]
Times = Mapping[str, Sequence[float]]

_THEIRS = {  # timm's benchmark.py has these; steps in milliseconds, of the whole batch
    "model": "name of the variant",
    "infer_samples_per_sec": "samples per second of inference",
    "infer_step_time": "ms of inference of one batch",
    "infer_batch_size": "samples",
    "infer_img_size": "pixels per side",
    "infer_gmacs": "1e9 multiply-accumulates of one sample",
    "train_samples_per_sec": "samples per second of the training step: forward, cross-entropy, backward, SGD",
    "train_step_time": "ms of one training step",
    "train_batch_size": "samples",
    "train_img_size": "pixels per side",
    "param_count": "parameters in millions",
}
_OURS = {
    "family": "name of the family",
    "precision": "of weights and activations",
    "top1": "published top-1 accuracy, per cent",
    "infer_latency": "ms of one sample alone",
    "infer_peak_mib": "MiB that inference of one batch holds at its peak, without the weights",
    "infer_matmul_share": "multiply-accumulates per second over those of a large matrix product, same precision",
    "train_peak_mib": "MiB that a training step holds at its peak, without weights and optimizer state",
    "train_matmul_share": "as infer_matmul_share; a step counts as three inferences",
    "matmul_gmacs_per_sec": "1e9 multiply-accumulates per second of the large matrix product in the same rounds",
    "deploy_samples_per_sec": "of vertebra.deploy(model, precision)",
    "deploy_step_time": "ms",
    "deploy_latency": "ms",
    "deploy_peak_mib": "MiB",
    "deploy_matmul_share": "share; multiply-accumulates are those of the plain network",
    "peer": "the network compared with: library.name",
    "peer_weights": "equal where the logits of both sides agree to 1e-4, else unequal",
    "peer_format": "its faster memory format in inference: nchw contiguous, cl channels_last",
    "peer_train_format": "its faster memory format in training",
    "peer_infer_samples_per_sec": "samples per second",
    "peer_infer_step_time": "ms",
    "peer_infer_latency": "ms",
    "peer_infer_peak_mib": "MiB",
    "peer_train_samples_per_sec": "samples per second",
    "peer_train_step_time": "ms",
    "peer_train_peak_mib": "MiB",
    "infer_ratio": "the peer's time over ours, median over rounds: above 1 ours is faster",
    "latency_ratio": "the same for one sample alone",
    "infer_peak_ratio": "our peak memory over the peer's: below 1 ours needs less",
    "train_ratio": "the peer's time over ours",
    "train_peak_ratio": "our peak memory over the peer's",
    "peer_deploy_step_time": "ms of the peer with branches and norms merged, where its library can do that",
    "deploy_ratio": "the peer's time, merged where it can be, over that of the deployed network, same precision",
    "deploy_latency_ratio": "the same for one sample alone",
    "deploy_ratio_float32": "the same peer's float32 time over that of the deployed network in this precision",
    "ratios_of": "paired: taken in turn in one run; different runs: read from a file",
    "rounds": "rounds of each comparison",
    "seconds": "what measuring this network took, all precisions",
    "error": "why there are no figures",
}
COLUMNS: dict[str, str] = _THEIRS | _OURS


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of their time over ours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def matmul_share(macs: float, times: Sequence[float], matmul_macs: float, matmul_times: Sequence[float]) -> float:
    """Median over rounds of (macs / time) / (matmul_macs / matmul_time): 1 is as fast as the large matrix product."""
    return macs / matmul_macs * ratio(matmul_times, times)


def speed_figures(side: str, times: Sequence[float], batch: int) -> Row:
    """samples_per_sec and step_time (ms) of `side`, from seconds of whole batches."""
    median = statistics.median(times)
    return {f"{side}_samples_per_sec": batch / median, f"{side}_step_time": 1e3 * median}


def inference_figures(precision: str, times: Times, alone: Times, batch: int, macs: float, matmul_macs: float) -> Row:
    """The inference columns of one precision.

    `times` has seconds of whole batches, `alone` of single samples, both under "infer float32", "deploy float32",
    "peer float32" and so on, of a peer as it is deployed under "merged float32"; `times` those of the matrix product
    under "matmul float32" too. `macs` is of one sample.
    """
    row: Row = {}
    matmul = times[f"matmul {precision}"]
    row["matmul_gmacs_per_sec"] = matmul_macs / statistics.median(matmul) / 1e9
    peer, peer_alone = times.get(f"peer {precision}"), alone.get(f"peer {precision}")
    ready, ready_alone = (t.get(f"merged {precision}", t.get(f"peer {precision}")) for t in (times, alone))
    for side, other, other_alone, ratio_name, latency_name in (
        ("infer", peer, peer_alone, "infer_ratio", "latency_ratio"),
        ("deploy", ready, ready_alone, "deploy_ratio", "deploy_latency_ratio"),
    ):
        if (ours := times.get(f"{side} {precision}")) is None:
            continue
        row |= speed_figures(side, ours, batch)
        row[f"{side}_matmul_share"] = matmul_share(macs * batch, ours, matmul_macs, matmul)
        if other is not None:
            row[ratio_name] = ratio(other, ours)
        if (single := alone.get(f"{side} {precision}")) is not None:
            row[f"{side}_latency"] = 1e3 * statistics.median(single)
            if other_alone is not None:
                row[latency_name] = ratio(other_alone, single)
    if peer is not None:
        row |= speed_figures("peer_infer", peer, batch)
    if peer_alone is not None:
        row["peer_infer_latency"] = 1e3 * statistics.median(peer_alone)
    if (merged := times.get(f"merged {precision}")) is not None:
        row["peer_deploy_step_time"] = 1e3 * statistics.median(merged)
    deployed, reference = times.get(f"deploy {precision}"), times.get("merged float32", times.get("peer float32"))
    if deployed is not None and reference is not None:
        row["deploy_ratio_float32"] = ratio(reference, deployed)
    return row


def training_figures(precision: str, times: Times, batch: int, macs: float, matmul_macs: float) -> Row:
    """The training columns of one precision, from seconds under "train float32", "peer float32", "matmul float32"."""
    row: Row = {}
    ours, theirs = times.get(f"train {precision}"), times.get(f"peer {precision}")
    if ours is not None:
        row |= speed_figures("train", ours, batch)
        # backward makes two products, of the gradients of inputs and of weights, for each product of forward
        share = matmul_share(3 * macs * batch, ours, matmul_macs, times[f"matmul {precision}"])
        row["train_matmul_share"] = share
    if theirs is not None:
        row |= speed_figures("peer_train", theirs, batch)
        if ours is not None:
            row["train_ratio"] = ratio(theirs, ours)
    return row


def memory_ratios(row: Row) -> Row:
    """Our peaks over the peer's, where both are there."""
    found = {}
    for side in ("infer", "train"):
        ours, theirs = row.get(f"{side}_peak_mib"), row.get(f"peer_{side}_peak_mib")
        if ours and theirs:
            found[f"{side}_peak_ratio"] = ours / theirs
    return found


def against_rows(row: Row, others: Sequence[Row]) -> Row:
    """What `row` gains beside that of an earlier table: the peer's columns and ratios of different runs.

    The row of the same network (under our name or timm's), image size, batch size and, where the table has it,
    precision; nothing where there is none.
    """
    names = {row["model"], peers.PEERS.get(row["model"], row["model"])}
    for other in others:
        keys = ("precision", "infer_img_size", "infer_batch_size")
        same = all(other.get(key) is None or other[key] == row[key] for key in keys)
        if other["model"] not in names or not same:
            continue
        gained: Row = {"peer": other["model"], "ratios_of": "different runs"}
        for side, name in (("infer", "infer_ratio"), ("train", "train_ratio")):
            for key in (f"{side}_samples_per_sec", f"{side}_step_time", f"{side}_latency", f"{side}_peak_mib"):
                if f"peer_{key}" in COLUMNS and other.get(key):
                    gained[f"peer_{key}"] = other[key]
            if row.get(f"{side}_samples_per_sec") and other.get(f"{side}_samples_per_sec"):
                gained[name] = row[f"{side}_samples_per_sec"] / other[f"{side}_samples_per_sec"]
        if row.get("infer_latency") and other.get("infer_latency"):
            gained["latency_ratio"] = other["infer_latency"] / row["infer_latency"]
        if row.get("deploy_samples_per_sec") and other.get("infer_samples_per_sec"):
            gained["deploy_ratio"] = row["deploy_samples_per_sec"] / other["infer_samples_per_sec"]
        if row.get("deploy_latency") and other.get("infer_latency"):
            gained["deploy_latency_ratio"] = other["infer_latency"] / row["deploy_latency"]
        return gained | memory_ratios(row | gained)
    return {}
