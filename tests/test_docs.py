"""The pages name what is there: files, classes, functions, metrics, and pages that links lead to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import esper_otel
from esper_otel.gateway.serve.metrics import _NOTICES, _OONA

pytestmark = pytest.mark.own_code

ROOT = Path(__file__).parent.parent
PACKAGE = Path(esper_otel.__file__).parent
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*PAGES, *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "SECURITY"))]
LINKING += [ROOT / folder / "README.md" for folder in ("collector-config", "deploy", "examples")]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))

_PATH = re.compile(r"[\w.~-]*[\w-]+(/[\w.-]+)*(/|\.(py|pyi|proto|md|txt|toml|yaml|yml))")
# What others call something of theirs.
FOREIGN = {
    *("Gauge.set", "force_flush()", "torch.dot", "promote_scope_metadata", "Accelerator.save_state", "math.dist"),
    *("step_latency_ms_milliseconds", "gpu_mem_used_gb_GB", "loss_loss", "os._exit", "compute_loss"),
    *("OTEL_EXPORTER_OTLP_CLIENT_KEY", "OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"),
    "logger_provider",
    *("SIGKILL", "memory_limiter", "otlp_http", "otlp_grpc", "Instrumentation", "spec.python.image"),
    *("SHA256SUMS", "SOURCE_DATE_EPOCH", "TerminateProcess", "DeprecationWarning", "torch.utils.checkpoint"),
    *("torch.utils.flop_counter.register_flop_formula", "torch.backends.cuda.matmul.allow_tf32"),
    *("build/release/", "vVERSION", "release.yml"),  # made by `make release`, a tag, and what PyPI asks for
    "esper_otel.TamiyoClinet",  # a misspelt name
    "FILE.sent",  # next to each file that was sent
    *("dist/", "train.py", "rates.py"),  # made by readers who follow the pages
}
# The names of these are put together.
GATEWAY_COUNTERS = {
    f"esper_gateway_{room}_{own.name}_total"
    for room, group in (("oona", _OONA), ("notices", _NOTICES))
    for own in group
}
# What the pages call an object of ours.
OBJECTS = {"telemetry": "Telemetry", "now": "Step", "loader": "Watch", "callback": "EsperCallback"}

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\))?")


def prose_of(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@cache
def sources() -> str:
    """All text in which a name may be defined or spelt out."""
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.proto"), *(ROOT / "deploy" / "prometheus").rglob("*.yml")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _members(node: ast.ClassDef) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            yield each.name
        elif isinstance(each, ast.AnnAssign | ast.Assign):
            for target in [each.target] if isinstance(each, ast.AnnAssign) else each.targets:
                if isinstance(target, ast.Name):
                    yield target.id
                elif isinstance(target, ast.Attribute):
                    yield target.attr


@cache
def classes() -> dict[str, set[str]]:
    """The package's classes with the names of what they have."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(_members(node))
    return found


@cache
def is_there(span: str) -> bool:
    """Whether what stands in backticks exists, if it is a file of ours or a name; anything else passes."""
    if span in FOREIGN:
        return True
    if _PATH.fullmatch(span):
        return any((folder / span).exists() for folder in (ROOT, PACKAGE))
    if not _NAME.fullmatch(span) or not re.search(r"[A-Z_.(]", span):
        return True
    module = PACKAGE.parent.joinpath(*span.split("."))
    if module.is_dir() or module.with_suffix(".py").is_file():
        return True
    name = span.removesuffix("()").removeprefix("esper_otel.")
    for room in ("aio.", "testing.", "schema.", "oona."):
        name = name.removeprefix(room)
    owner, _, member = name.partition(".")
    owner = OBJECTS.get(owner, owner)
    if member and owner in classes():
        return member in classes()[owner]
    if name in GATEWAY_COUNTERS:
        return True
    counter = re.fullmatch(r"esper_gateway_(\w+?)(?:_total)?", name)  # its name is put together
    setting = name.removeprefix("ESPER_").lower() if name.startswith("ESPER_") else name
    spellings = [counter[1], name] if counter else [name, setting]
    return any(  # looking for a name as it stands is a hundred times quicker
        each in sources() and re.search(rf"(?<![\w.]){re.escape(each)}(?!\w)", sources()) for each in spellings
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    """A file that moves, or a class that gets another name, takes the pages along."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page.read_text(encoding="utf-8")))]
    missing = [span for span in spans if not is_there(re.sub(r"\(.+\)$", "()", span))]
    assert not missing, f"{page.name} names what is not there: {missing}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_room_is_described(page: str) -> None:
    """A new folder says what it is for, where people look for it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = [path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    rooms = [str(folder) for folder in folders if folder.parts[0] == "gateway" or len(folder.parts) == 1]
    assert [room for room in rooms if f"`{room}/`" not in text] == []


def anchors_of(page: Path) -> set[str]:
    """The anchors of the headings of a page and of what it includes, as code hosts make them."""
    text = page.read_text(encoding="utf-8")
    included = [page.parent / file for file in re.findall(r"^```\{include\} (\S+)$", text, re.MULTILINE)]
    text = "\n".join(prose_of(each) for each in [text, *(file.read_text(encoding="utf-8") for file in included)])
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """To a file and a heading in it. Links to other sites are not followed: tests have no network."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text(encoding="utf-8"))):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors_of(target))):
            broken.append(link)
    assert broken == []


def test_the_checks_find_what_is_not_there() -> None:
    """Else the tests above would pass for any text."""
    for span in (
        *("gateway/sture.py", "sture/", "Ring.appendd", "Publishr", "esper.seeds.digestt", "frame_bytez()"),
        *("telemetry.pul()", "esper_otel.strat2", "esper_gateway_refusedd_total"),
        "esper_gateway_notices_refused_total",
    ):
        assert not is_there(span), span
    for span in (
        "gateway/store/sqlite.py",
        "record/",
        "Ring.append",
        "Publisher",
        "esper.seeds.digest",
        "frame_bytes()",
        "telemetry.pull()",
        "esper_otel.aio.TamiyoClient",
        "esper_gateway_refused_requests_total",
        "esper_gateway_notices_dropped_total",
    ):
        assert is_there(span), span


def test_every_decision_has_the_same_parts_and_stands_in_the_list() -> None:
    """Numbers are not used twice."""
    parts = ["The question", "What we decided", "Why", "What it costs, and when to look again"]
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    for page in DECISIONS:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == parts, page.name
        assert f"[{text.splitlines()[0].removeprefix('# ')}]({page.name})" in listed, page.name
    assert [int(page.name[:3]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
