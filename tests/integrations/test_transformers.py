"""`generate` gives the same tokens with fixpass: caches, tensor parallel ranks, batches."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from fixpass import last_reports
from fixpass.integrations import transformers as integration
from fixpass.integrations.transformers import compile
from fixpass.runtime.errors import ConfigError
from helpers import transformers_workers
from helpers.models import build
from helpers.ranks import Ranks

# transformers 5.19 renamed the option.
PAGE_SIZE = (
    "page_size"
    if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters
    else "block_size"
)

TOKENS = transformers_workers.TOKENS
# The passes run and every rewritten graph is checked; only Inductor's C++ is left out.
EAGER = {"lower": "eager"}


def prompts(length=7):
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(length))


def generate(module, cache, length=7, **more):
    implementation = {"cache_implementation": "static"} if cache == "static" else {}
    return module.generate(prompts(length), **TOKENS, **implementation, **more)


def norms_rewritten(reports):
    return any("became rms_norm" in str(report) for report in reports)


def assert_tokens_stay(name, cache, options, lengths=(7, 4)):
    module = build(name).module
    want = [generate(module, cache, length) for length in lengths]
    before = last_reports()
    assert compile(module, **options) is module
    got = [generate(module, cache, length) for length in lengths]
    new = [report for report in last_reports() if report not in before]
    assert norms_rewritten(new)
    assert not any(report.of_kind("failed") for report in new)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("name", "cache"), [("llama", "dynamic"), ("qwen3", "static")])
def test_tokens_stay_with_each_cache(name, cache):
    assert_tokens_stay(name, cache, EAGER, lengths=(7,))


@pytest.mark.full
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-packed", "qwen3-moe", "gemma2"])
def test_tokens_stay_in_more_models(name, cache):
    assert_tokens_stay(name, cache, EAGER)


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-packed", "qwen3-moe"])
def test_tokens_stay_through_inductor_in_more_models(name, cache):
    assert_tokens_stay(name, cache, {})


# A prefill and one token compile twice; more tokens compile with symbolic sizes too.
@pytest.mark.parametrize("length", [2, pytest.param(6, marks=pytest.mark.full)])
def test_a_model_that_is_spread_over_two_ranks_gives_the_same_tokens(tmp_path, length):
    module = build("llama").module
    module.save_pretrained(tmp_path)
    tokens = {**TOKENS, "max_new_tokens": length}
    want = module.generate(prompts(), **tokens)
    with Ranks(2) as ranks:
        results = ranks.run(transformers_workers.generate, str(tmp_path), prompts(), tokens, EAGER)
    for without, with_fixpass, local, report in results:
        assert torch.equal(without, want)
        assert torch.equal(with_fixpass, want)
        assert local == (32, 64)
        assert "became rms_norm" in report
        assert "o_proj: mm_3 writes f32[2, 64] into symmetric memory" in report


def test_continuous_batches_give_the_same_tokens():
    module = build("llama").module
    # transformers changes the attention of a model that it batches, and a compiled one sees that.
    requests = [[5, 6, 7, 8], [9, 10, 11], [3] * 12]
    settings = {
        "generation_config": GenerationConfig(**TOKENS | {"max_new_tokens": 3}),
        "continuous_batching_config": ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=64, **{PAGE_SIZE: 32}
        ),
    }

    def tokens():
        found = module.generate_batch(requests, **settings)
        return {name: output.generated_tokens for name, output in found.items()}

    want, before = tokens(), last_reports()
    compile(module, **EAGER)
    assert tokens() == want
    assert all(len(found) == 3 for found in want.values())
    assert norms_rewritten([report for report in last_reports() if report not in before])


def test_what_generate_compiles_by_itself_is_compiled_with_fixpass(monkeypatch):
    module = compile(build("llama").module, **EAGER)
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **config: asked.append(config) or call)
    # What transformers asks of a device with a compiler; on CPU it asks only where it is told to.
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    generate(module, "static", compile_config=config)
    assert [found["backend"] for found in asked] == ["fixpass"]
    assert asked[0]["options"] == EAGER
    assert asked[0]["mode"] is None


def test_a_mode_stays_and_so_does_a_backend_that_was_asked_for(monkeypatch):
    module = compile(build("llama").module)
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **config: asked.append(config) or call)
    module.get_compiled_call(None)
    module.get_compiled_call(CompileConfig(backend="eager", mode=None))
    assert [(found["backend"], found["mode"]) for found in asked] == [
        ("fixpass", "reduce-overhead"),
        ("eager", None),
    ]


def test_a_compiled_model_is_saved_copied_and_pickled_as_it_was(tmp_path):
    module = compile(build("llama").module, **EAGER)
    module.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        if other is not loaded:
            assert other.get_compiled_call.args[0] is other
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)


def test_what_is_no_transformers_model_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"Linear is no transformers model: .* backend=\"fixpass"):
        compile(torch.nn.Linear(2, 2))


class Adapter(torch.nn.Module):
    """A model around a transformers model, as PEFT builds it."""

    def __init__(self, module):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": module})

    def generate(self, *args, **kwargs):
        return self.base_model["model"].generate(*args, **kwargs)


def test_a_wrapper_is_refused_with_the_model_inside_it_which_then_compiles():
    wrapper = Adapter(build("llama").module)
    want, before = generate(wrapper, "dynamic"), last_reports()
    with pytest.raises(ConfigError, match=r"with compile\(model\.(.*)\), and call") as caught:
        compile(wrapper)
    path = caught.value.args[0].split("compile(model.")[1].split(")")[0]
    compile(wrapper.get_submodule(path), **EAGER)
    assert torch.equal(generate(wrapper, "dynamic"), want)
    # By identity: the deque of reports may be full, and then its length says nothing.
    assert norms_rewritten([new for new in last_reports() if not any(new is old for old in before)])


def test_an_unknown_option_is_refused_before_anything_changes():
    module = build("llama").module
    with pytest.raises(ConfigError, match="unknown option 'fast'"):
        compile(module, fast=True)
    assert module._compiled_call_impl is None


def test_in_an_older_transformers_the_model_runs_without_fixpass(monkeypatch, capfd):
    monkeypatch.setattr(integration, "version", lambda name: "4.57.1")
    module = build("llama").module
    said = []
    monkeypatch.setattr(integration.log, "warning", lambda text, *args: said.append(text % args))
    assert compile(module) is module
    assert module._compiled_call_impl is None
    assert said == [
        "fixpass supports transformers 5.0 and newer, found 4.57.1: the model runs without fixpass"
    ]
