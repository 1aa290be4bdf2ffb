"""Mistakes get an error that names them; odd inputs compile correctly or as they would without us.

Models are compared with eager mode, mostly with `lower="eager"`, and a few through Inductor.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fixpass
from fixpass import Config, Pass, explain
from fixpass.backend import last_reports
from fixpass.plan import check_torch
from fixpass.runtime.errors import ConfigError, FixpassError, UnsupportedTorchError
from fixpass.testing import assert_same, bf16, f32

OPTIONS = {"lower": "eager", "verify": True, "strict": True}
INDUCTOR = {"verify": True, "strict": True}


def llama(x, weight):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def compiled(fn, dynamic=None, fullgraph=True, **options):
    options = {**OPTIONS, **options}
    return torch.compile(
        fn, backend="fixpass", dynamic=dynamic, fullgraph=fullgraph, options=options
    )


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
        ({"passes": (print,)}, "instances of fixpass.Pass"),
        ({"lower": "triton"}, '"lower" is "inductor" or "eager"'),
        ({"strict": "yes"}, "'strict' is True or False"),
        ({"fuel": -1}, '"fuel" is a number of changes'),
        ({"fuel": True}, '"fuel" is a number of changes'),
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
        ("FIXPASS_LOWER", "triton", '"lower" is "inductor" or "eager", not \'triton\''),
        ("FIXPASS_NORM_KERNELS", "inductor, fastest", "unknown 'fastest'"),
    ],
)
def test_a_variable_that_does_not_parse_is_named(name, value, words):
    with pytest.raises(ConfigError) as caught:
        Config.resolve({}, {name: value})
    assert words in str(caught.value)


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


# Tensors that are not dense floats


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_norm_is_left_alone(dtype):
    def fn(x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    def of_magnitude(x, weight):
        return x * torch.rsqrt(x.abs().pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    x = torch.randn(4, 8, dtype=dtype)
    for model in (fn, of_magnitude):
        assert_same(compiled(model), model, x, torch.randn(8, dtype=dtype))
        assert_same(compiled(model), model, x, torch.randn(8))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_operand_beside_a_norm():
    def fn(adjacency, x, weight):
        return torch.sparse.mm(adjacency, llama(x, weight))

    for layout in ("to_sparse", "to_sparse_csr"):
        adjacency = getattr(torch.eye(4), layout)()
        assert_same(compiled(fn, fullgraph=False), fn, adjacency, f32(4, 8), f32(8))


def test_integers_normalised_after_a_cast():
    def fn(x, weight):
        return llama(x.float(), weight), F.layer_norm(x.double(), (8,))

    assert_same(compiled(fn), fn, torch.randint(-9, 9, (4, 8)), f32(8))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8), (0,)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_empty_tensors(shape, dynamic):
    def fn(x, weight):
        s = x + x
        return (
            llama(x, weight),
            F.rms_norm(x, x.shape[-1:], weight),
            F.layer_norm(s, x.shape[-1:], weight),
            s,
        )

    x, weight = f32(*shape), f32(shape[-1])
    assert_same(compiled(fn, dynamic), fn, x, weight)
    assert_same(
        compiled(fn, dynamic), fn, x.requires_grad_(), weight.requires_grad_(), gradients=True
    )


def test_a_tensor_without_dimensions():
    def fn(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), F.layer_norm(x[None], (1,))

    assert_same(compiled(fn), fn, f32())


class Wrapped(torch.Tensor):
    """A wrapper subclass that counts its operations; results are wrapped again."""

    count = 0

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.count += 1
        args, kwargs = torch.utils._pytree.tree_map_only(
            Wrapped, lambda t: t.inner, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapped, result)


@pytest.mark.parametrize(
    "model", [llama, lambda x, w: F.layer_norm(x, (8,), w)], ids=["llama", "layer_norm"]
)
def test_a_wrapper_subclass_is_unwrapped_and_wrapped_again(model):
    x, weight = f32(4, 24)[:, 8:16], f32(8)
    got = compiled(model)(Wrapped(x), weight)
    assert type(got) is Wrapped
    torch.testing.assert_close(got.inner, model(x, weight))


def test_a_parameter_that_is_a_subclass():
    module = nn.Linear(8, 8, bias=False)
    module.weight = nn.Parameter(Wrapped(module.weight.detach()))

    def fn(x):
        return llama(F.linear(x, module.weight), x[0])

    x = f32(4, 8)
    torch.testing.assert_close(compiled(fn)(x).inner, fn(x).inner)


def test_a_nested_tensor():
    rows = [f32(3, 8), f32(5, 8)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)

    def fn(x):
        return F.layer_norm(x, (8,)) * 2

    got = compiled(fn)(x)
    for a, b in zip(got.unbind(), rows, strict=True):
        torch.testing.assert_close(a, fn(b))


# Mutation and aliasing


def mutates_before(x, weight):
    x.add_(1)
    return llama(x, weight)


def mutates_after(x, weight):
    y = llama(x, weight)
    x.mul_(2)
    return y, x + y


def mutates_a_copied_source(x, weight):
    copy = x.transpose(0, 1).contiguous()
    x.mul_(2)
    return llama(copy, weight)


def mutates_between_sum_and_norm(x, weight):
    s = x + weight
    x.mul_(3)
    y = llama(s, weight)
    s.add_(1)
    return y, s


def writes_the_result_back(x, weight):
    x.copy_(llama(x, weight))
    return x.sum()


def normalises_in_place(x, weight):
    x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return x.mul_(weight)


def writes_through_a_view(x, weight):
    head = x[:, :4]
    y = llama(x, weight)
    head.zero_()
    return y, llama(x, weight)


def mutates_the_weight(x, weight):
    y = llama(x, weight)
    weight.add_(1)
    return y, llama(x, weight)


MUTATING = (
    mutates_before,
    mutates_after,
    mutates_a_copied_source,
    mutates_between_sum_and_norm,
    writes_the_result_back,
    normalises_in_place,
    writes_through_a_view,
    mutates_the_weight,
)


@pytest.mark.parametrize("fn", MUTATING)
@pytest.mark.parametrize("dynamic", [None, True])
def test_inputs_that_are_written_to(fn, dynamic):
    assert_same(compiled(fn, dynamic), fn, f32(8, 8), f32(8))
    assert_same(compiled(fn, dynamic), fn, f32(8, 24)[:, 8:16], f32(8))


@pytest.mark.inductor
def test_inputs_that_are_written_to_through_inductor():
    def fn(a, b, c, weight):
        return (
            mutates_after(a, weight),
            mutates_a_copied_source(b, weight),
            writes_through_a_view(c, weight),
        )

    model = torch.compile(fn, backend="fixpass", fullgraph=True, options=INDUCTOR)
    assert_same(model, fn, f32(8, 8), f32(8, 8), f32(8, 8), f32(8))


def add_norm(x, residual, weight):
    s = x + residual
    return llama(s, weight), s


def test_one_tensor_given_twice():
    x = f32(4, 8)
    assert_same(compiled(add_norm), add_norm, x, x, f32(8))
    y = f32(8, 8)
    assert_same(compiled(llama), llama, y, y[0])


@pytest.mark.parametrize("fn", [mutates_before, mutates_after, mutates_a_copied_source])
def test_overlapping_views_of_one_storage(fn):
    base = f32(100)

    def shared(x, weight, other):
        return fn(x, weight), llama(other, weight)

    x, other = base[:64].view(8, 8), base[8:72].view(8, 8)
    assert_same(compiled(shared), shared, x, f32(8), other)
    assert_same(compiled(shared), shared, x, base[90:98], other)


def test_a_result_that_is_an_input_or_a_view_of_one():
    def fn(x, weight):
        y = llama(x, weight)
        return x, y, y[1:], x.view(-1), x[:, ::2]

    x, weight = f32(4, 8), f32(8)
    assert_same(compiled(fn), fn, x, weight)
    got = compiled(fn)(x, weight)
    assert got[0] is x
    assert got[3].data_ptr() == x.data_ptr()
    assert got[2].untyped_storage().data_ptr() == got[1].untyped_storage().data_ptr()


def test_a_copy_that_is_also_a_result():
    def fn(x, weight):
        copy = x.transpose(0, 1).contiguous()
        return llama(copy, weight), copy

    x = f32(8, 8)
    assert_same(compiled(fn), fn, x, f32(8))
    copy = compiled(fn)(x, f32(8))[1]
    assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


# Weights


@pytest.mark.parametrize(
    "weight",
    [
        lambda: f32(16)[::2],
        lambda: f32(8, 3)[:, 1],
        lambda: f32(1).expand(8),
        lambda: f32(9)[1:],
        lambda: f32(1, 8),
        lambda: f32(4, 8),
        lambda: f32(1),
        lambda: f32(),
        lambda: torch.randint(1, 5, (8,)),
        lambda: torch.randn(8, dtype=torch.float64),
        lambda: torch.randn(8, dtype=torch.complex64),
    ],
    ids=[
        "every second",
        "column",
        "expanded",
        "offset",
        "(1, n)",
        "a row each",
        "(1,)",
        "()",
        "int",
        "f64",
        "complex",
    ],
)
def test_a_weight_of_any_stride_shape_and_dtype(weight):
    assert_same(compiled(llama), llama, f32(4, 8), weight())
    assert_same(compiled(llama), llama, bf16(4, 8), weight())


def test_gradients_of_a_weight_alone_and_of_an_input_alone():
    for x, weight in ((f32(4, 8), f32(8).requires_grad_()), (f32(4, 8).requires_grad_(), f32(8))):
        for fn in (
            llama,
            lambda x, w: F.layer_norm(x, (8,), w),
            lambda x, w: torch.ops.fixpass.rms_norm(x, w, None, 1e-6),
        ):
            assert_same(compiled(fn), fn, x, weight, gradients=True)


def test_gradients_of_a_residual_norm_of_which_one_result_is_used():
    x, residual, weight = (t.requires_grad_() for t in (f32(4, 8), f32(4, 8), f32(8)))

    def op(i):
        return lambda x, r, w: torch.ops.fixpass.add_rms_norm(x, r, w, None, 1e-6)[i]

    for fn in (op(0), op(1), op(slice(None)), add_norm):
        assert_same(compiled(fn), fn, x, residual, weight, gradients=True)


# Ways to run


def test_inference_mode_and_no_grad():
    model = compiled(llama)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            x, weight = f32(4, 8), f32(8)
            torch.testing.assert_close(model(x, weight), llama(x, weight))
    outside = f32(4, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model(outside, outside[0]), llama(outside, outside[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    linear = nn.Linear(8, 8)

    def fn(x, weight):
        y = linear(x)
        return llama(y, weight), F.layer_norm(y, (8,), weight, weight), F.rms_norm(y, (8,), weight)

    with torch.autocast("cpu", dtype):
        assert_same(compiled(fn), fn, f32(4, 8), f32(8), rtol=1.6e-2, scaled=True)


def test_a_graph_break_between_two_norms():
    def fn(x, weight):
        y = llama(x, weight)
        torch._dynamo.graph_break()
        return llama(y + x, weight), y

    assert_same(compiled(fn, fullgraph=False), fn, f32(4, 8), f32(8))
    assert_same(
        compiled(fn, fullgraph=False), fn, f32(4, 8).requires_grad_(), f32(8), gradients=True
    )


def test_two_graphs_share_a_module():
    norm = nn.RMSNorm(8)
    nn.init.normal_(norm.weight)
    models = [lambda x, k=k: norm(x) * k for k in (1.0, 2.0)]
    for model in models:
        assert_same(compiled(model), model, f32(4, 8))
    with torch.no_grad():
        norm.weight.mul_(3)
    for model in models:
        assert_same(compiled(model), model, f32(4, 8))


def test_a_module_called_with_several_shapes_strides_and_dtypes():
    model = compiled(llama)
    for x in (
        f32(4, 8),
        f32(5, 8),
        f32(2, 3, 8),
        f32(6, 16)[:, ::2],
        bf16(4, 8),
        f32(1, 8),
        f32(0, 8),
        f32(8),
    ):
        assert_same(model, llama, x, f32(8))


def test_a_size_that_depends_on_data():
    def fn(x, mask, weight):
        return llama(x[mask], weight)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same(compiled(fn), fn, f32(4, 8), torch.tensor([True, False, True, True]), f32(8))


def test_branches_checkpoints_and_function_transforms():
    def branch(p, x, weight):
        return torch.cond(p, llama, lambda x, weight: x * weight, (x, weight))

    def checkpointed(x, weight):
        return torch.utils.checkpoint.checkpoint(llama, x, weight, use_reentrant=False)

    x, weight = f32(4, 8), f32(8)
    assert_same(compiled(branch), branch, torch.tensor(True), x, weight)
    transforms = (
        torch.vmap(llama, in_dims=(0, None)),
        torch.vmap(llama, in_dims=(1, None)),
        torch.func.grad(lambda x, weight: llama(x, weight).sum()),
        lambda x, weight: torch.func.jvp(lambda a: llama(a, weight), (x,), (x,)),
    )
    for fn in transforms:
        assert_same(compiled(fn), fn, f32(8, 8), weight)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert_same(compiled(branch), branch, torch.tensor(False), x, weight, gradients=True)
    assert_same(compiled(checkpointed), checkpointed, x, weight, gradients=True)


class Cache(nn.Module):
    """Writes normalised keys into a buffer, as attention does with a static cache."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.register_buffer("keys", torch.zeros(6, 8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x, position):
        self.keys.index_copy_(0, position, self.norm(x))
        self.count += 1
        return llama(self.keys, self.norm.weight), self.keys[position]


def test_a_module_that_writes_into_its_buffers():
    ours, plain = Cache(), Cache()
    model = compiled(ours)
    with torch.no_grad():
        for i in range(3):
            x, position = f32(2, 8), torch.tensor([i, i + 1])
            torch.testing.assert_close(model(x, position), plain(x, position))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))


def test_tensors_without_memory():
    x, weight = f32(4, 8).to("meta"), f32(8).to("meta")
    assert compiled(llama)(x, weight).shape == (4, 8)


def test_values_that_are_not_finite():
    x = torch.tensor([[float("nan")] * 8, [float("inf")] * 8, [1e30] * 8, [0.0] * 8])
    assert_same(compiled(llama), llama, x, f32(8))
    assert_same(compiled(llama), llama, torch.full((2, 8), 6e4, dtype=torch.float16), f32(8))


@pytest.mark.parametrize("lower", ["inductor", "eager"])
def test_an_unknown_mode_is_named(lower, monkeypatch):
    monkeypatch.setenv("FIXPASS_LOWER", lower)
    with pytest.raises(Exception, match=r"mode=fastest.*reduce-overhead"):
        torch.compile(llama, backend="fixpass", mode="fastest")(f32(4, 8), f32(8))


@pytest.mark.inductor
def test_a_second_derivative_is_refused_as_inductor_refuses_it():
    def second(model):
        x = f32(4, 8).requires_grad_()
        (first,) = torch.autograd.grad(model(x, f32(8)).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward") as caught:
            first.sum().backward()
        return str(caught.value)

    expected = second(torch.compile(llama, backend="inductor"))
    torch._dynamo.reset()
    assert second(torch.compile(llama, backend="fixpass")) == expected
    torch._dynamo.reset()
    assert second(compiled(llama)) == expected


@pytest.mark.inductor
def test_a_graph_without_a_norm_compiles_as_with_inductor():
    def fn(x):
        return torch.sin(x) @ x

    assert_same(
        torch.compile(fn, backend="fixpass"),
        torch.compile(fn, backend="inductor"),
        f32(8, 8),
        rtol=0,
        atol=0,
    )
