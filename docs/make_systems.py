"""Write docs/systems.md: one row for each system, from the registry, benchmarks/results and the models' docstrings."""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vertebra import mixers
from vertebra.registry import Family, Variant, families

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "systems.md", ROOT / "benchmarks" / "results"
TOLERANCE = 0.05  # of measured against published multiply-accumulates

# Why a published number of multiply-accumulates is not what is counted: pattern of names -> what is known. That the
# official code counts as ours does was found by running it under the same counter.
REASONS = {
    "ceit_*": "the paper leaves out the two products of attention",
    "cloformer_xxs": "not known; the official code counts as ours does",
    "cloformer_*": "not known; the official code of `cloformer_xxs` counts as ours does",
    "conformer_small_patch32": "ours pools before a projection, the official code after it (and counts 7.05)",
    "conv2former_n": "not known; the official code counts as ours does",
    "crossformer_pp_small": "the repository prints the value of a formula; its code counts as ours does",
    "fat_b0": "not known; the official code counts as ours does",
    "fat_*": "not known; the official code of `fat_b0` counts as ours does",
    "gc_vit_xtiny": "not known; the official code counts as ours does",
    "gc_vit_*": "not known; the official code of three smaller models counts as ours does",
    "lightvit_tiny": "not known; the official code counts as ours does",
    "lightvit_*": "not known; the official code of `lightvit_tiny` counts as ours does",
    "mobile_former_26m": "not known; convolutions and matrix products of the official code count as ours do",
    "mobile_former_*": "not known; those of the official `mobile_former_26m` count as ours do",
    "unireplknet_b": "published at 224 pixels (there 16.22, fused 16.06), the weights are for 384",
}

INTRO = f"""\
# The systems

<!-- written by docs/make_systems.py; do not edit -->

One row for each system. Left of a slash stands what was published, right of it what is measured here. Where a paper
prints no parameters, or those of another structure than its code trains, the count of the official code stands there.

- **Ranks**: numbers of spatial axes that `ndim` takes.
- **Parity**: worst relative error of all outputs against the official code, and over how many references
  ([all of them](../benchmarks/results/parity.md)).
- **Parameters and GMACs** are of one variant, the first with published figures; those of all variants are in
  [costs.csv](../benchmarks/results/costs.csv). GMACs are 1e9 multiply-accumulates for one input of the variant's
  published size, half of what torch's `FlopCounterMode` counts: convolutions and matrix products, among them both
  products of attention, in fused kernels too. Softmax, norms, activations, pooling, interpolation, Fourier transforms
  and grid sampling count nothing. "fused" is the network that `vertebra.fuse` gives, where it counts otherwise.
  Variants whose figures lie more than {TOLERANCE:.0%} apart are [at the end](#where-counts-differ).
- **Checkpoints**: *direct* can be fetched by `pretrained=True`; *manual* has to be fetched by hand (a cloud drive) and
  given as `checkpoint=PATH`; *none* was never published. Then the licence of the weights, as far as one is stated.
- **Notes**: what is unusual in the system, and where ours does more or other than the official code.
"""


@dataclass(frozen=True)
class Cost:
    """A row of costs.csv; None where a figure is missing."""

    params: float
    params_published: float | None
    gmacs: float
    gmacs_published: float | None
    gmacs_fused: float | None


def number(text: str) -> Any:
    """As it is printed: an int stays one; None where nothing is."""
    return None if not text else int(text) if text.isdigit() else float(text)


def read_costs() -> dict[str, Cost]:
    """Figures by variant."""
    with (RESULTS / "costs.csv").open(newline="", encoding="utf-8") as stored:
        columns = ("params_m", "params_published", "gmacs", "gmacs_published", "gmacs_fused")
        rows = list(csv.DictReader(stored))
    return {row["model"]: Cost(*(number(row[c]) for c in columns)) for row in rows}


def read_parity() -> dict[str, list[float]]:
    """Relative errors of all references by family."""
    found: dict[str, list[float]] = {}
    for line in (RESULTS / "parity.md").read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| (\w+)/\S+ \| .* \| (\S+) \|", line)
        if row:
            found.setdefault(row[1], []).append(float(row[2]))
    return found


def papers(text: str, title: str, venue: str) -> str:
    """Title, venue and links to arXiv."""
    numbers = re.findall(r"(?<![\d.])\d{4}\.\d{5}(?!\d)", text)
    links = [f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in numbers]
    links += [f"[doi {doi}](https://doi.org/{doi})" for doi in re.findall(r"10\.\d{4,}/\S+", text)]
    return f"{title}, {', '.join([venue, *links])}"


def ranks(family: Family) -> str:
    """Ranks of all variants, and of those that exist at fewer."""
    of = {name: v.config.get("model", family.model).ndims for name, v in family.variants.items()}
    most = max(of.values(), key=len)
    fewer = {name: nd for name, nd in of.items() if nd != most}
    groups = {nd: [f"`{name}`" for name, mine in fewer.items() if mine == nd] for nd in fewer.values()}
    return "; ".join(
        [", ".join(map(str, most)), *(f"{', '.join(n)}: {', '.join(map(str, d))}" for d, n in groups.items())]
    )


def parity(code: str, errors: list[float]) -> str:
    """The worst error and the number of references."""
    if errors:
        return f"{max(errors):.1e} ({len(errors)})".replace("0.0e+00", "0")
    return "no official code" if code == "none" else "not measured"


def span(names: list[str], costs: dict[str, Cost]) -> str:
    """How many variants, the smallest and the largest."""
    ordered = sorted(names, key=lambda n: costs[n].params if n in costs else 0)
    return f"`{names[0]}`" if len(names) == 1 else f"{len(names)}: `{ordered[0]}` to `{ordered[-1]}`"


def representative(family: Family) -> str:
    """The first variant with published parameters and GMACs, else with published parameters."""
    for wanted in (("params_m", "gmacs"), ("params_m",), ()):
        for name, variant in family.variants.items():
            if all(variant.published.get(key) is not None for key in wanted):
                return name
    raise ValueError(f"{family.name} has no variants")


def figure(published: float | None, measured: float | None) -> str:
    """Published / measured; a dash where there is none."""
    return " / ".join(("–" if published is None else str(published), "–" if measured is None else f"{measured:.5g}"))


def place(location: str) -> str:
    """Host and owner of an address; words as they are, without the file's name."""
    address = re.fullmatch(r"https?://([^/]+)((?:/[^/]+){0,2}).*", location)
    if not address:
        return re.sub(r"^\S+\.pth(?: and \S+\.pth)?, |: \S+\.pth.*$", "", location)
    owner = {"github.com": address[2], "huggingface.co": "/" + address[2].split("/")[1]}
    return address[1] + owner.get(address[1], "")


def checkpoints(variants: list[Variant]) -> str:
    """For each status the number of variants and the first two places where they lie; then the licences."""
    parts = []
    for status in ("direct", "manual", "none"):
        these = [v.weights for v in variants if v.weights.status == status]
        places = list(dict.fromkeys(place(w.location) for w in these if w.location))
        where = " and ".join(places[:2]) + (" and others" if places[2:] else "")
        if these:
            parts.append(f"{status} {len(these)}" + (f": {where}" if where else ""))
    licences = sorted({v.weights.licence for v in variants if v.weights.licence and v.weights.status != "none"})
    return "; ".join([*parts, *(["licence: " + ", ".join(licences)] if licences else [])])


def notes(doc: str) -> str:
    """From "Unusual here" to the end of a module's docstring, or without those words all but its title."""
    paragraphs = [" ".join(p.split()) for p in doc.replace("``", "`").strip().split("\n\n")]
    start = next((i for i, p in enumerate(paragraphs) if p.startswith("Unusual here: ")), 1)
    found = [p.removeprefix("Unusual here: ") for p in paragraphs[start:]]
    found[0] = found[0][:1].upper() + found[0][1:]
    return "\n\n".join(textwrap.fill(p, 120, break_long_words=False, break_on_hyphens=False) for p in found)


def row(family: Family, costs: dict[str, Cost], errors: list[float]) -> list[str]:
    example = representative(family)
    published, cost = family.variants[example].published, costs.get(example)
    gmacs = figure(published.get("gmacs"), cost and cost.gmacs)
    if cost and cost.gmacs_fused is not None:
        gmacs += f" (fused {cost.gmacs_fused:.5g})"
    return [
        f"`{family.name}`",
        papers(family.arxiv, family.paper, family.venue),
        span(list(family.variants), costs),
        ranks(family),
        parity(family.code, errors),
        f"`{example}`",
        figure(published.get("params_m"), cost and cost.params),
        gmacs,
        checkpoints(list(family.variants.values())),
        f"[notes](#{family.name})",
    ]


HYDRA = mixers.HydraAttention  # a paper without a network of its own: a module for other networks
HYDRA_ROW = [
    "`hydra_attention`",
    papers("2209.07484", "Hydra Attention: Efficient Attention with Many Heads", "ECCV 2022 Workshops"),
    "a mixer: `vertebra.mixers.HydraAttention`",
    "1, 2, 3",
]


def hydra(errors: list[float]) -> list[str]:
    width = 64
    params = sum(p.numel() for p in HYDRA(width).parameters()) / 1e6
    rest = [f"width {width}", figure(None, params), "–", "none", "[notes](#hydra_attention)"]
    return [*HYDRA_ROW, parity("none", errors), *rest]


def differing(costs: dict[str, Cost]) -> list[list[str]]:
    """Variants whose counted GMACs are more than TOLERANCE off the published ones, and the reason if it is known."""
    found = []
    for name, cost in costs.items():
        if cost.gmacs_published is None or abs(cost.gmacs / cost.gmacs_published - 1) <= TOLERANCE:
            continue
        published, fused = cost.gmacs_published, cost.gmacs_fused
        reason = next((text for pattern, text in REASONS.items() if fnmatch.fnmatch(name, pattern)), "not known")
        half = 0.5 * 10.0 ** -len(str(published).partition(".")[2])  # of the last digit that is printed
        if abs(cost.gmacs - published) <= half:
            reason = "equal in the digits that are printed"
        elif fused is not None and (abs(fused / published - 1) <= TOLERANCE or abs(fused - published) <= half):
            reason = f"published for the fused network, which counts {fused:.5g}"
        ratio = cost.gmacs / published
        found.append([f"`{name}`", str(published), f"{cost.gmacs:.5g}", f"{ratio:.2f}", reason])
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page() -> str:
    """The whole text."""
    costs, errors = read_costs(), read_parity()
    header = [
        "System",
        "Paper",
        "Variants",
        "Ranks",
        "Parity",
        "Example",
        "Parameters, M",
        "GMACs",
        "Checkpoints",
        "Notes",
    ]
    rows = {name: row(family, costs, errors.get(name, [])) for name, family in families().items()}
    texts = {name: importlib.import_module(f"vertebra.models.{name}").__doc__ or "" for name in families()}
    rows["hydra_attention"] = hydra(errors.get("hydra_attention", []))
    texts["hydra_attention"] = (
        importlib.import_module(HYDRA.__module__).__doc__ + "\n\n" + textwrap.dedent(HYDRA.__doc__)
    )
    parts = [INTRO, table(header, [rows[name] for name in sorted(rows)]), "", "## Notes"]
    for name in sorted(texts):
        parts += ["", f"### {name}", "", notes(texts[name])]
        if name in families() and families()[name].model.EXPORT:
            parts += ["", f"Exports at one input size: {families()[name].model.EXPORT}."]
    parts += ["", "## Where counts differ", ""]
    parts.append(f"Variants whose measured GMACs are more than {TOLERANCE:.0%} off the published ones.\n")
    parts.append(table(["Variant", "Published", "Measured", "Ratio", "Reason"], differing(costs)))
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write it (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    args = parser.parse_args()
    text = page()
    if args.check:
        raise SystemExit(0 if args.out.exists() and args.out.read_text(encoding="utf-8") == text else 1)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
