"""The switch in vLLM: when it puts our passes in, where, and what it says when it does not.

A stand-in of vLLM's configuration is enough for that; tests/engines runs the real engine.
"""

import logging
import os
import pickle
from importlib.metadata import entry_points

import pytest
from torch import fx

from fixpass.integrations.vllm import engine_config as plugin
from fixpass.runtime.errors import ConfigError
from helpers import vllm_standin

PRE, POST, ENTRY = (
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "pre_grad_custom_pass",
)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.delenv("FIXPASS", raising=False)
    # Set by the test or by fixpass, and not there afterwards.
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE")
    plugin.say_once.cache_clear()
    with vllm_standin.loaded(tmp_path, monkeypatch) as engine:
        yield engine


@pytest.fixture
def said():
    """The warnings that the plugin gave."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    plugin.log.addHandler(handler)
    yield lines
    plugin.log.removeHandler(handler)


def configured(engine, backend="", mode=None, **more):
    """The options of Inductor after vLLM's configuration is made."""
    from vllm.config.vllm import CompilationConfig, CompilationMode, VllmConfig

    mode = CompilationMode[mode] if mode else None
    options = more.pop("options", {})
    compilation = CompilationConfig(backend, mode, inductor_compile_config=options)
    return VllmConfig(compilation, **more).compilation_config


# When it is on


def test_vllm_finds_the_plugin():
    (found,) = entry_points(group="vllm.general_plugins", name="fixpass")
    assert found.load() is plugin.register


def test_the_backends_name_puts_our_passes_in_where_the_platform_replaces_the_backend(engine):
    plugin.register()
    compilation = configured(engine, "fixpass")
    assert sorted(compilation.inductor_compile_config) == [PRE, ENTRY]
    assert compilation.backend == "inductor"
    assert compilation.ir_enable_torch_wrap


def test_the_variable_alone_puts_our_passes_in(engine, monkeypatch):
    plugin.register()
    monkeypatch.setenv("FIXPASS", "1")
    assert PRE in configured(engine).inductor_compile_config


def test_vllms_own_mode_gets_one_pass_at_vllms_own_place(engine):
    plugin.register()
    compilation = configured(engine, "fixpass", "VLLM_COMPILE", platform="gpu")
    assert list(compilation.inductor_compile_config) == [POST]
    assert "VLLM_USE_AOT_COMPILE" not in os.environ


def test_without_the_switch_nothing_changes(engine, said, monkeypatch):
    plugin.register()
    for value in ("0", ""):
        monkeypatch.setenv("FIXPASS", value)
        compilation = configured(engine)
        assert compilation.inductor_compile_config == {}
        assert not compilation.ir_enable_torch_wrap
    assert said == []


def test_a_switch_that_is_no_yes_or_no_is_named(engine, monkeypatch):
    plugin.register()
    monkeypatch.setenv("FIXPASS", "maybe")
    with pytest.raises(ConfigError, match="FIXPASS='maybe': say one of 1, true"):
        configured(engine)


def test_registering_twice_hooks_once_and_configuring_twice_gives_the_same(engine, monkeypatch):
    plugin.register()
    hook = engine.VllmConfig.__post_init__
    plugin.register()
    assert engine.VllmConfig.__post_init__ is hook
    compilation = configured(engine, "fixpass")
    before = compilation.inductor_compile_config[PRE].uuid()
    monkeypatch.setenv("FIXPASS", "1")
    engine.VllmConfig(compilation)
    assert compilation.inductor_compile_config[PRE].hooks == ()
    assert compilation.inductor_compile_config[PRE].uuid() == before


def test_options_come_with_vllms_additional_configuration(engine):
    plugin.register()
    options = {"fixpass": {"disable": ("join-qk-norms",), "inductor": {"max_autotune": True}}}
    compilation = configured(engine, "fixpass", additional_config=options)
    assert compilation.inductor_compile_config[PRE].config.disable == ("join-qk-norms",)
    assert compilation.inductor_compile_config["max_autotune"] is True
    with pytest.raises(ConfigError, match="unknown option 'disabel'"):
        configured(engine, "fixpass", additional_config={"fixpass": {"disabel": ()}})


def test_a_rank_may_wait_for_one_that_compiles_unless_a_time_was_given():
    assert plugin.resolve({}).symmetric_timeout == plugin.PATIENCE
    assert plugin.resolve({"fixpass": {"symmetric_timeout": 7.0}}).symmetric_timeout == 7.0


# Caches


def test_the_key_is_one_in_every_process_and_changes_with_an_option(engine):
    plugin.register()
    options = configured(engine, "fixpass").inductor_compile_config
    for place in (PRE, ENTRY):
        copy = pickle.loads(pickle.dumps(options[place]))
        assert copy.uuid() == options[place].uuid()
        changed = configured(
            engine, "fixpass", additional_config={"fixpass": {"fuel": 3}}
        ).inductor_compile_config[place]
        assert changed.uuid() != copy.uuid()
    assert options[PRE].uuid() != options[ENTRY].uuid()


def test_a_compiled_function_that_vllm_could_not_load_is_not_asked_for(engine, monkeypatch):
    plugin.register()
    configured(engine, "fixpass")
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "0"
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    configured(engine, "fixpass")
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "1"


def test_a_users_pass_in_our_place_runs_first_and_is_in_the_key(engine):
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Theirs(CustomGraphPass):
        key = "one"

        def __call__(self, graph):
            graph.seen = True

        def uuid(self):
            return self.key

    plugin.register()
    theirs = Theirs()
    ours = configured(engine, "fixpass", options={PRE: theirs}).inductor_compile_config[PRE]
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    ours(graph)
    assert graph.seen
    before = ours.uuid()
    theirs.key = "two"
    assert ours.uuid() != before
    theirs.key = None
    assert ours.uuid() is None


# What stands in the way


def test_another_version_is_named_once_and_not_touched(engine, said):
    engine.__version__ = "0.40.1"
    original = engine.VllmConfig.__post_init__
    plugin.register()
    plugin.register()
    assert engine.VllmConfig.__post_init__ is original
    assert said == [
        "fixpass: fixpass works with vLLM 0.32, and this is 0.40.1: vLLM runs without fixpass"
    ]


def test_an_engine_that_is_not_here_is_named(said, monkeypatch):
    plugin.say_once.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    plugin.register()
    (line,) = said
    assert line.startswith("fixpass: vLLM is not here")


def other(original):
    def theirs(self):
        original(self)

    return theirs


def test_a_plugin_that_hooked_the_place_before_us_keeps_it(engine, said, monkeypatch):
    theirs = engine.VllmConfig.__post_init__ = other(engine.VllmConfig.__post_init__)
    monkeypatch.setenv("FIXPASS", "1")
    plugin.register()
    plugin.register()
    assert engine.VllmConfig.__post_init__ is theirs
    assert configured(engine).inductor_compile_config == {}
    (line,) = said
    assert "VllmConfig.__post_init__ is other.<locals>.theirs of" in line
    assert "another plugin hooks the same place; VLLM_PLUGINS says" in line


def test_a_plugin_that_hooks_the_place_behind_us_keeps_it_too(engine, said):
    plugin.register()
    engine.VllmConfig.__post_init__ = other(engine.VllmConfig.__post_init__)
    for _ in range(2):
        compilation = configured(engine, "fixpass")
        assert compilation.inductor_compile_config == {}
        assert compilation.backend == "inductor"
    (line,) = said
    assert "other.<locals>.theirs" in line
    assert "in front of fixpass: vLLM runs without fixpass" in line


@pytest.mark.parametrize(
    ("backend", "mode", "reason"),
    [
        ("fixpass", "NONE", "compilation mode NONE compiles nothing that fixpass sees"),
        ("eager", None, "the backend is 'eager', not Inductor"),
        ("other.backend", "DYNAMO_TRACE_ONCE", "the backend is 'other.backend', not Inductor"),
    ],
)
def test_nothing_to_put_passes_in_is_said_once(engine, said, monkeypatch, backend, mode, reason):
    plugin.register()
    monkeypatch.setenv("FIXPASS", "1")
    for _ in range(2):
        assert configured(engine, backend, mode).inductor_compile_config == {}
    assert said == [f"fixpass: {reason}: vLLM runs without fixpass"]


def test_the_switch_costs_no_import_of_our_passes_while_it_is_off(engine):
    import sys

    plugin.register()
    configured(engine)
    assert "fixpass.integrations.vllm.inductor_stages" not in sys.modules


def test_without_the_pass_behind_it_no_all_reduce_is_taken_from_vllm(engine):
    plugin.register()
    steps = {
        disable: configured(engine, "fixpass", additional_config={"fixpass": {"disable": disable}})
        .inductor_compile_config[ENTRY]
        .pipeline()
        .passes
        for disable in ((), ("place-symmetric-memory",))
    }
    names = [[step.name for step in each] for each in steps.values()]
    assert "functionalize-shm-all-reduce" in names[0]
    assert "functionalize-shm-all-reduce" not in names[1]
