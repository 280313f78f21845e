"""The dashboard's files: their headers, and that every metric they name is one the server shows.

The page's arithmetic runs in node where there is one.
"""

import json
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from peftserve.engine.messages import AdapterResidency, EngineStats, StepUpdate
from tests.adapters import files
from tests.api.conftest import MakeWorld, client_of
from tests.api.harness import World, add_adapter

FILES = resources.files("peftserve.api.http.dashboard")
PAGE = FILES.joinpath("page.html").read_text("utf-8")
GRAFANA = json.loads(FILES.joinpath("grafana.json").read_bytes())
METRIC = re.compile(r"\b(?:vllm:|peftserve_|process_)\w+")


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text inside script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.inline else None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.inline[self._inside].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


@pytest.fixture(scope="module")
def elements() -> Elements:
    parser = Elements()
    parser.feed(PAGE)
    return parser


async def test_the_page_may_run_its_own_inline_parts_and_nothing_else(
    client: httpx.AsyncClient, elements: Elements
) -> None:
    response = await client.get("/dashboard")
    assert response.status_code == 200
    assert response.text == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    for kind, texts in elements.inline.items():
        hashes = [f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts]
        assert hashes
        assert policy.pop(f"{kind}-src").split() == hashes
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_the_page_needs_nothing_from_elsewhere(elements: Elements) -> None:
    for tag, attributes in elements.tags:
        assert not attributes.keys() & {"src", "style", "srcset"}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        target = attributes.get("href") or ""
        assert target in ("", "data:,", "dashboard/grafana.json")
    assert re.findall(r"https?://[^\s\"']+", PAGE) == ["http://www.w3.org/2000/svg"]  # a namespace, never fetched
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert sink not in PAGE


async def test_both_files_are_public_and_the_data_is_not(make: MakeWorld) -> None:
    async with client_of(make(api_keys={"key-a": "a"})) as client:
        statuses = {
            path: (await client.get(path)).status_code
            for path in ("/dashboard", "/dashboard/grafana.json", "/metrics", "/v1/adapters")
        }
    assert statuses == {"/dashboard": 200, "/dashboard/grafana.json": 200, "/metrics": 401, "/v1/adapters": 401}


async def shown(world: World) -> dict[str, set[str]]:
    """Sample name -> its labels, of a server that has served every kind of adapter."""
    adapters = {"x": files.lora(), "y": files.prefix(), "z": files.bottleneck()}
    digests = {name: add_adapter(world, name, made) for name, made in adapters.items()}
    place = AdapterResidency(
        digest=digests["x"],
        name="x",
        tenant="default",
        kind="lora",
        state="device",
        refs=0,
        pinned=False,
        host_bytes=1,
        device_bytes=1,
        load_s=0.2,
    )
    world.engine.residency = {digests["x"]: place}
    step = StepUpdate(events=[], stats=EngineStats(step=1), step_s=0.01, num_batch_tokens=7, residency=[place])
    world.services.metrics.engine_update(step)
    async with client_of(world) as client:
        for adapter in (None, *adapters):
            response = await client.post("/v1/generate", json={"prompt": "x", "adapter_id": adapter})
            assert response.status_code == 200
        text = (await client.get("/metrics")).text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


async def test_the_page_names_metrics_that_exist(world: World) -> None:
    named = set(METRIC.findall(PAGE))
    assert len(named) > 15
    assert named <= (await shown(world)).keys()


def expressions(value: Any) -> Iterator[str]:
    """Every PromQL expression and variable query in Grafana's JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("expr", "definition"):
                yield item
            else:
                yield from expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions(item)


async def test_grafana_names_metrics_and_labels_that_exist(world: World) -> None:
    labels = await shown(world)
    queries = list(expressions(GRAFANA))
    assert len(queries) > 30
    for query in queries:
        metrics = set(METRIC.findall(query))
        assert metrics, query
        assert metrics <= labels.keys()
        matched = re.findall(r"(\w+)=~?\"", query)
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
        queried = re.findall(r"label_values\(\S+, (\w+)\)", query)
        known = {"instance"}.union(*(labels[metric] for metric in metrics))  # Prometheus adds `instance`
        assert {*matched, *grouped, *queried} <= known, query


async def test_grafana_can_import_the_file(client: httpx.AsyncClient) -> None:
    response = await client.get("/dashboard/grafana.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == GRAFANA
    assert GRAFANA["id"] is None  # else Grafana looks for a dashboard to replace
    assert GRAFANA["schemaVersion"] >= 39
    panels = GRAFANA["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in GRAFANA["templating"]["list"]}
    used = re.findall(r"\$\{?(\w+)", json.dumps(GRAFANA))
    assert {name for name in used if not name.startswith("__")} == variables
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def in_node(elements: Elements, expression: str, *values: Any) -> Any:
    """`expression` over the page's own functions; `values` are its `input`."""
    code = f"{elements.inline['script'][0]}\nconst input = {json.dumps(values)};\n"
    done = subprocess.run(
        ["node", "-e", code + f"console.log(JSON.stringify({expression}))"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


@needs_node
async def test_the_page_reads_the_text_format(world: World, elements: Elements) -> None:
    world.engine.stats = EngineStats(running_adapters=['a"b', "c\\nd", "e\nf", "g} 1"])
    await shown(world)
    text = world.services.metrics.render().decode()
    samples = in_node(elements, "parse(input[0]).map((s) => [s.name, s.labels, String(s.value)])", text)
    expected = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert [(name, labels) for name, labels, _ in samples] == [(sample.name, sample.labels) for sample in expected]
    assert [float(value) for *_, value in samples] == [sample.value for sample in expected]


@needs_node
def test_the_page_computes_quantiles_of_what_came_since(elements: Elements) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("t", "", ["kind", "adapter"], buckets=(1, 2, 4), registry=registry)

    def scrape() -> str:
        return "".join(
            f'{s.name}{{kind="{s.labels["kind"]}",adapter="x",le="{s.labels["le"]}"}} {s.value}\n'
            for family in registry.collect()
            for s in family.samples
            if s.name == "t_bucket"
        )

    for _ in range(10):
        histogram.labels("lora", "x").observe(3)
    then = scrape()
    for seconds in (0.5, 1.5, 1.5, 1.5):
        histogram.labels("lora", "x").observe(seconds)
    now = scrape()
    of = """((now, then) => {
        const [a, b] = [now, then].map((text) => histograms(parse(text), "t_bucket").get(seriesKey("lora", "x")));
        const counts = since(a.counts, b?.counts);
        return [0.5, 0.95].map((q) => quantile(q, a.bounds, total([counts, counts])));
    })(...input)"""
    # One of four in (0, 1], three in (1, 2]: the rank of p50 is 2, a third of the way through the second bucket.
    assert in_node(elements, of, now, then) == pytest.approx([4 / 3, 1 + 2.8 / 3])
    assert in_node(elements, of, now, now) == [None, None]
    # The adapter was deleted and came again with fewer: all of them are new.
    assert in_node(elements, of, then, now) == pytest.approx([3, 3.9])
    assert in_node(elements, of, then, "") == pytest.approx([3, 3.9])
    histogram.labels("lora", "x").observe(99)
    assert in_node(elements, of, scrape(), now) == [4, 4]  # beyond the last bound
