"""Reports beside cached graphs: one file for one graph, one set of passes, one set of options."""

import logging

import pytest
import torch

from fixpass import Remark, Report
from fixpass.kept_reports import KeptReports

REPORT = Report((Remark("a-pass", "applied", "mul", "text", "layers.0", 8),), "a title")


def traced(fn, *args, dynamic=None):
    """The graph that Dynamo traces."""
    found = []
    torch._dynamo.reset()
    compiled = torch.compile(
        fn, backend=lambda gm, _: found.append(gm) or gm.forward, dynamic=dynamic
    )
    compiled(*args)
    return found[0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_report_is_found_by_the_same_graph_passes_and_options(cache):
    KeptReports.of(traced(torch.sin, torch.ones(4)), "key", {"a": 1}).add(REPORT)
    again = KeptReports.of(traced(torch.sin, torch.ones(4)), "key", {"a": 1})
    assert again.recall() == (REPORT,)
    assert cache in again.path.parents


def test_a_report_that_was_just_made_is_not_recalled():
    kept = KeptReports.of(traced(torch.sin, torch.ones(4)), "key", {})
    kept.add(REPORT)
    assert kept.recall() == ()


def test_the_backward_graphs_report_joins_that_of_the_forward_graph():
    gm = traced(torch.sin, torch.ones(4))
    kept = KeptReports.of(gm, "key", {})
    kept.add(REPORT)
    kept.add(Report(title="backward"))
    assert KeptReports.of(gm, "key", {}).recall() == (REPORT, Report(title="backward"))


def test_every_fact_of_a_compile_has_a_file_of_its_own():
    x = torch.ones(4, 6)
    base = traced(torch.sin, x)
    with torch.no_grad():
        without_gradients = KeptReports.of(base, "key", {})
    found = [
        without_gradients,
        KeptReports.of(base, "key", {}),
        KeptReports.of(base, "other key", {}),
        KeptReports.of(base, "key", {"max_autotune": True}),
        KeptReports.of(traced(torch.cos, x), "key", {}),
        KeptReports.of(traced(torch.sin, x.bfloat16()), "key", {}),
        KeptReports.of(traced(torch.sin, x[:3]), "key", {}),
        KeptReports.of(traced(torch.sin, torch.ones(6, 4).t()), "key", {}),
        KeptReports.of(traced(torch.sin, x, dynamic=True), "key", {}),
        KeptReports.of(traced(torch.sin, torch.ones(4, 6, requires_grad=True)), "key", {}),
        KeptReports.of(traced(lambda x: x * 2.0, x), "key", {}),
        KeptReports.of(traced(lambda x: x * 3.0, x), "key", {}),
    ]
    assert len({kept.path for kept in found}) == len(found)


def test_an_input_that_prints_its_address_has_the_same_file_in_each_process():
    gm, paths = traced(torch.sin, torch.ones(4)), []
    (node,) = gm.graph.find_nodes(op="placeholder")
    for value in (object(), object()):
        node.meta["example_value"] = value
        paths.append(KeptReports.of(gm, "key", {}).path)
    assert paths[0] == paths[1]


def test_nothing_is_kept_where_nothing_is_cached(cache):
    gm = traced(torch.sin, torch.ones(4))
    kept = [KeptReports.of(gm, None, {})]
    with torch._inductor.config.patch(force_disable_caches=True):
        kept.append(KeptReports.of(gm, "key", {}))
    for each in kept:
        each.add(REPORT)
        assert each.path is None
    assert not (cache / "fixpass").exists()


def test_a_file_that_cannot_be_read_or_written_costs_the_report_alone(cache, monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("fixpass"), "info", lambda text, *_: said.append(text))
    gm = traced(torch.sin, torch.ones(4))
    kept = KeptReports.of(gm, "key", {})
    assert kept.recall() == ()
    kept.add(REPORT)
    kept.path.write_text('[{"title": "", "remarks": [{"unknown": 1}]}]')
    assert KeptReports.of(gm, "key", {}).recall() == ()
    kept.path.unlink()
    (cache / "fixpass").rmdir()
    (cache / "fixpass").write_text("a file in the place of the folder")
    kept.add(REPORT)
    assert said[0].startswith("the graph is from Inductor's cache, without its report")
    assert said[-1].startswith("the report is not kept")
