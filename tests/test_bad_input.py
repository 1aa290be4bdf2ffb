"""Mistakes get an error that names them: options, variables, targets, versions, passes of others.

By default a graph compiles without a pass that breaks it, and the report says so.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fixpass
from fixpass import Config, Pass, explain
from fixpass.backend import last_reports
from fixpass.runtime.errors import ConfigError, FixpassError, UnsupportedTorchError
from fixpass.runtime.versions import check_torch
from fixpass.testing import assert_same, f32
from helpers.compiling import compiled
from helpers.spellings import llama


def error_of(call):
    """The message of the FixpassError behind what Dynamo raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, FixpassError), repr(error)
    return f"{type(error).__name__}: {error}"


# What is asked for wrongly


def test_an_unknown_option_is_named_and_the_known_ones_are_listed():
    text = error_of(
        lambda: torch.compile(llama, backend="fixpass", options={"strickt": True})(
            f32(4, 8), f32(8)
        )
    )
    assert "unknown option 'strickt'; known options: strict, verify, lower" in text
    assert "'strickt'" in error_of(lambda: fixpass.compile(llama, strickt=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_kernels": ("fastest",)}, "'norm_kernels': unknown 'fastest'; known: inductor"),
        ({"norm_kernels": "inductor"}, "'norm_kernels' is a sequence"),
        ({"norm_kernels": 3}, "'norm_kernels' is a sequence"),
        (
            {"disable": ("canonicalise-norms",)},
            "'disable': unknown 'canonicalise-norms'; known: functionalize",
        ),
        ({"passes": (print,)}, "is no instance of fixpass.Pass"),
        ({"lower": "triton"}, 'option \'lower\' is "inductor" or "eager"'),
        ({"strict": "yes"}, "'strict' is True or False"),
        ({"fuel": -1}, "'fuel' is a number of changes"),
        ({"fuel": True}, "'fuel' is a number of changes"),
        ({"inductor": "max_autotune"}, "'inductor' is a mapping"),
    ],
)
def test_an_option_with_a_wrong_value_is_named(options, words):
    with pytest.raises(ConfigError) as caught:
        Config.resolve(options, {})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FIXPASS_STRICT", "maybe", "FIXPASS_STRICT='maybe': say one of 1, true, on"),
        ("FIXPASS_FUEL", "many", "FIXPASS_FUEL='many' is not a number"),
        ("FIXPASS_FUEL", "²", "FIXPASS_FUEL='²' is not a number"),
        ("FIXPASS_FUEL", "-1", "FIXPASS_FUEL='-1' is not a number"),
        ("FIXPASS_LOWER", "triton", 'FIXPASS_LOWER is "inductor" or "eager", not \'triton\''),
        ("FIXPASS_NORM_KERNELS", "inductor, fastest", "'norm_kernels': unknown 'fastest'"),
    ],
)
def test_a_variable_that_does_not_parse_is_named(name, value, words):
    with pytest.raises(ConfigError) as caught:
        Config.resolve({}, {name: value})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("FIXPASS_STRCT", "FIXPASS_STRICT"),
        ("FIXPASS_NORM_KERNEL", "FIXPASS_NORM_KERNELS"),
        ("FIXPASS_EAGER_KERNEL", "FIXPASS_EAGER_KERNELS"),
        ("FIXPASS_FOLD_WEIGHT", "FIXPASS_FOLD_WEIGHTS"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(variable, near):
    with pytest.raises(ConfigError, match=rf"unknown variable {variable}; near names: {near}\b"):
        Config.resolve({}, {variable: "1"})


def test_an_unknown_variable_ends_the_first_compile(monkeypatch):
    monkeypatch.setenv("FIXPASS_VERFY", "1")
    run = torch.compile(llama, backend="fixpass")
    assert "near names: FIXPASS_VERIFY" in error_of(lambda: run(f32(4, 8), f32(8)))


def test_variables_of_the_engines_and_of_the_tests_are_known():
    assert Config.resolve({}, {"FIXPASS": "1", "FIXPASS_TEST_FULL": "1"}) == Config()


@pytest.mark.parametrize(
    ("options", "environ", "new", "config"),
    [
        ({"fold": "derived"}, {}, "'fold_weights' with 'cache' in", Config(fold_weights="cache")),
        ({"fold": "inplace"}, {}, "'fold_weights' with 're", Config(fold_weights="restride")),
        ({"fold": "off"}, {}, "use option 'fold_weights'$", Config(fold_weights="off")),
        ({"guards": False}, {}, "use option 'eager_kernels'$", Config(eager_kernels=False)),
        ({}, {"FIXPASS_GUARDS": "off"}, "_EAGER_KERNELS$", Config(eager_kernels=False)),
        ({}, {"FIXPASS_FOLD": "off"}, "FIXPASS_FOLD_WEIGHTS$", Config(fold_weights="off")),
        ({}, {"FIXPASS_FOLD": "inplace"}, "_WEIGHTS with 're", Config(fold_weights="restride")),
    ],
)
def test_an_old_name_works_and_warns_with_the_new_one(options, environ, new, config):
    with pytest.warns(DeprecationWarning, match=new):
        assert Config.resolve(options, environ) == config


def test_a_sequence_may_be_any_iterable():
    options = {
        "disable": iter(["lower-norms"]),
        "norm_kernels": iter(["inductor"]),
        "passes": iter([]),
    }
    expected = Config(disable=("lower-norms",), norm_kernels=("inductor",))
    assert Config.resolve(options, {}) == expected


def test_an_option_wins_over_its_variable():
    assert Config.resolve({"fuel": 2}, {"FIXPASS_FUEL": "1", "FIXPASS_LOWER": "eager"}) == Config(
        fuel=2, lower="eager"
    )


def test_an_unknown_target_is_named_and_the_known_ones_are_listed():
    with pytest.raises(
        ConfigError, match=r"unknown target 'rocm:gfx9'; known targets: cpu, .*rocm:gfx942"
    ):
        explain(llama, f32(4, 8), f32(8), target="rocm:gfx9")


@pytest.mark.parametrize("version", ["2.5.0", "2.10.1+cu128", "2.15.0a0+git1234", "3.0.0"])
def test_an_unsupported_torch_is_named_with_a_way_out(version):
    with pytest.raises(
        UnsupportedTorchError, match=r'supports torch 2.11 to 2.14, found .*backend="inductor"'
    ):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1"])
def test_a_supported_torch_is_accepted(version):
    check_torch(version)


# Passes of third parties


@dataclass(frozen=True)
class Raises(Pass):
    name: ClassVar[str] = "raises"

    def run(self, graph, result):
        node = graph.output_node()
        node.args = (None,)
        raise IndexError("out of luck")


@dataclass(frozen=True)
class LeavesUseBeforeDefinition(Pass):
    name: ClassVar[str] = "leaves-use-before-definition"

    def run(self, graph, result):
        first, last = [n for n in graph.nodes if n.op == "call_function"][:2]
        first.args = (last, *first.args[1:])
        result.applied(first, "moved")


@dataclass(frozen=True)
class RecordsWrongStrides(Pass):
    name: ClassVar[str] = "records-wrong-strides"

    def run(self, graph, result):
        node = next(n for n in graph.nodes if n.op == "call_function" and n.meta["val"].dim() == 2)
        node.meta["val"] = node.meta["val"].t().contiguous().t()
        result.applied(node, "made column-major, or so it says")


@dataclass(frozen=True)
class RecordsNothing(Pass):
    name: ClassVar[str] = "records-nothing"

    def run(self, graph, result):
        node = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_after(node):
            copy = graph.call_function(torch.ops.aten.clone.default, (node,))
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


@dataclass(frozen=True)
class ChangesTheResult(Pass):
    name: ClassVar[str] = "changes-the-result"

    def run(self, graph, result):
        node = graph.output_node()
        with graph.inserting_before(node):
            value = node.args[0][0]
            new = graph.call_function(torch.ops.aten.sum.default, (value,))
            new.meta["val"] = value.meta["val"].sum()
        node.args = ((new, *node.args[0][1:]),)


BROKEN = {
    Raises(): "IndexError: out of luck",
    LeavesUseBeforeDefinition(): "left a malformed graph",
    RecordsWrongStrides(): "records f32[4, 8][1, 4] but gives f32[4, 8]",
    RecordsNothing(): "without a recorded value",
    ChangesTheResult(): "changed the results from (f32[4, 8]) to (f32[])",
}
broken = pytest.mark.parametrize(
    ("step", "words"), BROKEN.items(), ids=[step.name for step in BROKEN]
)


@broken
@pytest.mark.parametrize("verify", [True, False])
def test_a_graph_compiles_without_a_broken_pass_and_the_report_says_so(step, words, verify):
    fn = compiled(llama, passes=(step,), strict=False, verify=verify)
    assert_same(fn, llama, f32(4, 8), f32(8))
    (remark,) = last_reports()[-1].of_kind("failed")
    assert remark.pass_name == step.name
    assert words in remark.text


@broken
def test_a_broken_pass_is_an_error_under_strict(step, words):
    text = error_of(lambda: compiled(llama, passes=(step,))(f32(4, 8), f32(8)))
    assert text.startswith(f"PassError: pass {step.name}: ")
    assert words in text


@pytest.mark.inductor
def test_inductor_compiles_what_is_left_of_a_graph_without_its_broken_passes():
    passes = (Raises(), LeavesUseBeforeDefinition(), RecordsWrongStrides())
    fn = torch.compile(llama, backend="fixpass", options={"passes": passes, "verify": True})
    assert_same(fn, llama, f32(4, 8), f32(8))
    assert [r.pass_name for r in last_reports()[-1].of_kind("failed")] == [
        step.name for step in passes
    ]
