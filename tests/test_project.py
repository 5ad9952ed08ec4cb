"""What the project promises as a package: light imports, a core that stands alone, one version, shipped types."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import vertebra

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("timm", "torchvision", "lightning", "lightning_fabric", "torchmetrics")
# Everything the plain install brings beside the core's own three: torch, safetensors, huggingface_hub.
NOT_CORE = (*HEAVY, "typer", "rich", "pydantic", "matplotlib", "sklearn", "PIL")

# Finds nothing, rather than raising: torch asks find_spec for some of these, and for an absent package that is None.
BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {NOT_CORE!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str) -> str:
    """The standard output of `code` in a fresh interpreter; its error output if it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_leaves_training_libraries_alone() -> None:
    loaded = run(f"import sys, vertebra; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == "[]"


def test_core_works_without_training_libraries() -> None:
    out = run(
        BLOCK
        + """
import tempfile, pathlib, torch, vertebra
for name, ndim in (("resnet18", 2), ("repvgg_a0", 1)):
    model = vertebra.create_model(name, ndim=ndim, num_classes=7).eval()
    x = torch.randn(2, 3, *(64,) * ndim)
    with torch.no_grad():
        want = model(x)
        assert want.shape == (2, 7), want.shape
        path = pathlib.Path(tempfile.mkdtemp()) / "official.pth"
        torch.save(vertebra.to_official(model), path)
        other = vertebra.create_model(name, ndim=ndim, num_classes=7).eval()
        vertebra.load_checkpoint(other, path)
        assert torch.equal(other(x), want)
        torch.testing.assert_close(vertebra.fuse(model)(x), want, rtol=1e-4, atol=1e-4)
print("done")
"""
    )
    assert out.endswith("done")


def test_block_really_blocks() -> None:
    """Without this the test above could pass because nothing is blocked."""
    for name in HEAVY:
        out = run(BLOCK + f"\ntry:\n    import {name}\nexcept ModuleNotFoundError as e:\n    print('absent', e.name)")
        assert out == f"absent {name}"


def test_import_costs_little_beside_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import vertebra; print(time.perf_counter() - t)"
    # The least of three: other processes can only add to the time.
    seconds = min(float(run(code)) for _ in range(3))
    assert seconds < 0.2, f"import vertebra took {seconds:.3f} s after torch; something heavy is imported at top level"


def test_version_is_the_metadata_version() -> None:
    assert vertebra.__version__ == importlib.metadata.version("vertebra")


def test_types_are_shipped() -> None:
    assert importlib.resources.files("vertebra").joinpath("py.typed").is_file()


def test_readme_holds_the_two_commands() -> None:
    """.ci/run takes the marked block; it must be the README's second command, and the first must run the main job."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)
    marked = re.search(r"^<!-- ci:test -->\n```bash\n(.*?)^```$", text, flags=re.M | re.S)
    assert marked is not None and marked.group(1) == commands[1]
    assert "vertebra train" in commands[0] and "pytest" in commands[1]


def test_readme_lists_every_family() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Families", 1)[1].split("\n## ", 1)[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.M))
    assert rows == set(vertebra.list_families())
