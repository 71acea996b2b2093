"""The network as others use it: other cycles, dtypes, function transforms, hidden states, layers called alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from .tiny import tiny_model


IDS = torch.tensor([[21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33, 34, 35, 36, 37, 38]])
TYPES = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]] * 2)


def labels() -> torch.Tensor:
    return IDS.masked_fill(TYPES == 1, -100)


# ---- 7: gradient calls follow the config ----------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(IDS, token_type_ids=TYPES, labels=labels(), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


CYCLES = [
    {"H_cycles": 1},
    {"H_cycles": 3},
    {"L_cycles": 1},
    {"L_cycles": 4},
    {"H_cycles": 1, "L_cycles": 1},
    {"H_cycles": 3, "L_cycles": 2},
]


@pytest.mark.parametrize("cycles", CYCLES, ids=str)
@pytest.mark.parametrize("called_before", [False, True])
def test_cycles_changed_on_a_live_model(cycles, called_before):
    """Logits and gradients are those of a model that was made with these cycles."""
    model = tiny_model(num_layers_per_stack=1).train()
    made = tiny_model(num_layers_per_stack=1, **cycles).train()
    made.load_state_dict(model.state_dict())
    if called_before:
        gradients(model)
    for name, value in cycles.items():
        setattr(model.config, name, value)
    wanted, got = gradients(made), gradients(model)
    for name, gradient in wanted.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, msg=name)
    assert got["model.L_module.layers.0.mlp.down_proj.weight"].abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, made(IDS).logits)


def test_cycles_changed_back_and_cached():
    """A cache made for other cycles is refused or right, and the old cycles come back whole."""
    model = tiny_model(num_layers_per_stack=1)
    with torch.no_grad():
        before = model(IDS).logits
        live = model(IDS[:, :4], use_cache=True).past_key_values
        model.config.H_cycles = 3
        deeper = model(IDS, use_cache=False).logits
        try:
            logits = model(IDS[:, 4:], past_key_values=live).logits
        except ValueError:
            pass
        else:
            torch.testing.assert_close(logits, deeper[:, 4:], atol=1e-4, rtol=1e-4)
        tokens = model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert torch.equal(tokens[:, 8], deeper[:, -1].argmax(dim=-1))
        model.config.H_cycles = 2
        torch.testing.assert_close(model(IDS).logits, before)


def test_gradient_steps_follow_the_config_too():
    model = tiny_model(num_layers_per_stack=1).train()
    model.config.L_bp_cycles = [0, 1]
    made = tiny_model(num_layers_per_stack=1, L_bp_cycles=[0, 1]).train()
    made.load_state_dict(model.state_dict())
    wanted, got = gradients(made), gradients(model)
    for name, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.parametrize("bp_steps", [2, 4])
def test_chosen_gradient_steps_survive_fewer_cycles_or_are_refused(bp_steps):
    """Steps chosen for 2 x 3 do not silently become something else at 1 x 1."""
    model = tiny_model(num_layers_per_stack=1).train()
    model.set_gradient_steps(bp_steps)
    model.config.H_cycles = model.config.L_cycles = 1
    try:
        got = gradients(model)
    except ValueError:
        return
    assert got["model.L_module.layers.0.mlp.down_proj.weight"].abs().max() > 0
    assert got["model.H_module.layers.0.mlp.down_proj.weight"].abs().max() > 0


# ---- 8: the rotary table --------------------------------------------------------------------------------------------


def table(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.model.rotary_emb(torch.zeros(1), torch.arange(200)[None])


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to dtype and device": lambda m: m.to("cpu", torch.float16),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.bfloat16),
    "of the network alone": lambda m: m.model.bfloat16() and m,
    "of the table alone": lambda m: m.model.rotary_emb.half() and m,
    "there and back": lambda m: m.bfloat16().float(),
    "half, then bfloat16, then float": lambda m: m.half().bfloat16().float(),
    "applied": lambda m: m._apply(lambda t: t.bfloat16() if t.is_floating_point() else t),
    "a copy": lambda m: copy.deepcopy(m.bfloat16()),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_table_is_float32_and_exact(cast):
    model = tiny_model(num_layers_per_stack=1)
    wanted = table(model)
    changed = CASTS[cast](model)
    for got, right in zip(table(changed), wanted):
        assert got.dtype == torch.float32
        assert torch.equal(got, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_table_of_a_loaded_model(dtype, tmp_path):
    model = tiny_model(num_layers_per_stack=1)
    wanted = table(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    for got, right in zip(table(loaded), wanted):
        assert got.dtype == torch.float32 and torch.equal(got, right)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        again = type(model)(model.config)
    finally:
        torch.set_default_dtype(previous)
    assert all(torch.equal(got, right) for got, right in zip(table(again), wanted))


def test_there_and_back_changes_far_positions_by_no_more_than_the_weights():
    """Weights that bfloat16 holds exactly come back exactly, and with them every logit."""
    model = tiny_model(num_layers_per_stack=1, max_position_embeddings=1024)
    model.bfloat16().float()
    ids = torch.randint(20, 96, (1, 600))
    with torch.no_grad():
        before = model(ids).logits
        after = model.bfloat16().float()(ids).logits
    assert torch.equal(before, after)


# ---- 13: function transforms ----------------------------------------------------------------------------------------


def loss_of(model):
    def loss(parameters):
        output = functional_call(model, parameters, (IDS,), {"token_type_ids": TYPES, "use_cache": False})
        logits = output.logits[:, :-1].reshape(-1, output.logits.shape[-1])
        return torch.nn.functional.cross_entropy(logits, labels()[:, 1:].reshape(-1))

    return loss


def trained_parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_func_grad():
    model = tiny_model(num_layers_per_stack=1).train()
    got = grad(loss_of(model))(trained_parameters(model))
    wanted = gradients(model)
    for name, gradient in got.items():
        right = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(gradient, right, msg=name, atol=1e-5, rtol=1e-4)


def test_func_vmap_of_grad():
    """Gradients of each example, as differential privacy and influence functions take them."""
    model = tiny_model(num_layers_per_stack=1, attn_implementation="eager").train()
    parameters = trained_parameters(model)

    def loss(parameters, embeds):
        output = functional_call(model, parameters, (), {"inputs_embeds": embeds[None], "use_cache": False})
        return output.logits.square().mean()

    embeds = model.get_input_embeddings()(IDS).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = vmap(grad(loss), in_dims=(None, 0))(parameters, embeds)
    for i in range(2):
        one = grad(loss)(parameters, embeds[i])
        for name, gradient in one.items():
            torch.testing.assert_close(each[name][i], gradient, msg=name, atol=1e-5, rtol=1e-4)


def test_func_jvp():
    """A directional derivative, against a difference quotient in float64."""
    model = tiny_model(num_layers_per_stack=1, attn_implementation="eager").double().eval()
    model.set_gradient_steps(8)
    embeds = model.get_input_embeddings()(IDS).detach()
    direction = torch.randn_like(embeds)

    def logits(embeds):
        return model(inputs_embeds=embeds, token_type_ids=TYPES, use_cache=False).logits

    _, got = jvp(logits, (embeds,), (direction,))
    with torch.no_grad():
        wanted = (logits(embeds + 1e-5 * direction) - logits(embeds - 1e-5 * direction)) / 2e-5
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


# ---- 14: hidden states, and parts called alone ----------------------------------------------------------------------


@pytest.fixture
def both(tmp_path):
    """Our model and the library's, with the same weights."""
    library = pytest.importorskip(
        "transformers.models.hrm_text", reason="this transformers has no HRM-Text of its own"
    )
    ours = tiny_model(seed=1)
    ours.save_pretrained(tmp_path)
    return ours, library.HrmTextForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()


@torch.no_grad()
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("call", ["whole", "padded", "cached"])
def test_hidden_states_are_the_librarys(both, network, call):
    arguments = {"input_ids": IDS, "token_type_ids": TYPES, "output_hidden_states": True}
    if call == "padded":
        # At padding the two differ, since nothing may be read there.
        arguments["attention_mask"] = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
        arguments["token_type_ids"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]] * 2)
    states = []
    for model in both:
        model = model.model if network else model
        if call == "cached":
            live = model(IDS[:, :4], use_cache=True).past_key_values
            cached = {"input_ids": IDS[:, 4:], "past_key_values": live, "output_hidden_states": True}
            states.append(model(**cached).hidden_states)
        else:
            states.append(model(**arguments).hidden_states)
    got, wanted = states
    assert len(got) == len(wanted)
    kept = slice(None) if call != "padded" else slice(0, 6)
    for i, (mine, right) in enumerate(zip(got, wanted)):
        torch.testing.assert_close(mine[:, kept], right[:, kept], atol=1e-4, rtol=1e-4, msg=f"hidden state {i}")


@torch.no_grad()
def test_the_last_hidden_state_is_the_last(both):
    ours, _ = both
    output = ours.model(IDS, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def part_arguments(theirs, tokens: int = 8, past: int = 0):
    hidden = torch.randn(2, tokens, 32)
    positions = torch.arange(past, past + tokens)[None]
    return hidden, positions, theirs.model.rotary_emb(hidden, positions)


MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
    "bool of rows": lambda: (
        torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).gt(0.5) | torch.eye(8).bool()
    ),
    "float": lambda: torch.zeros(1, 1, 8, 8).masked_fill(
        torch.ones(8, 8).triu(1).bool(), torch.finfo(torch.float32).min
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("table", ["theirs", "ours"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("part", ["layer", "stack"])
def test_a_layer_and_a_stack_called_alone(both, part, mask, table):
    """As tools that calibrate, prune or probe call them, by keyword and with the hidden states alone in front."""
    ours, theirs = both
    hidden, positions, cos_sin = part_arguments(theirs)
    parts = [model.model.L_module if part == "stack" else model.model.L_module.layers[1] for model in both]
    arguments = {"attention_mask": MASKS[mask](), "position_ids": positions}
    wanted = parts[1](hidden, position_embeddings=cos_sin, **arguments)
    if table == "ours":
        cos_sin = ours.model.rotary_emb(hidden, positions)
    got = parts[0](hidden, position_embeddings=cos_sin, **arguments)
    assert isinstance(got, torch.Tensor), "the library returns the hidden states alone"
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("part", ["layer", "stack"])
def test_a_part_called_alone_over_a_cache(both, part):
    from transformers import DynamicCache

    results = []
    first, positions, _ = part_arguments(both[1], 5)
    second = torch.randn(2, 3, 32)
    for model in both:
        module = model.model.H_module if part == "stack" else model.model.H_module.layers[0]
        live, outputs = DynamicCache(), []
        for slot in range(6):
            live.update(torch.zeros(2, 4, 0, 8), torch.zeros(2, 4, 0, 8), slot)
        for hidden, at in ((first, positions), (second, torch.arange(5, 8)[None])):
            mask = torch.ones(hidden.shape[1], int(at[0, -1]) + 1, dtype=torch.bool).tril(int(at[0, 0]))[None, None]
            cos_sin = both[1].model.rotary_emb(hidden, at)
            outputs.append(
                module(
                    hidden,
                    attention_mask=mask,
                    position_ids=at,
                    past_key_values=live,
                    position_embeddings=cos_sin,
                    cycle_offset=4,
                )
            )
        results.append((outputs, live.layers[4].keys))
    for got, wanted in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_forward_is_traced_by_fx_where_the_librarys_is(both, which):
    fx = pytest.importorskip("transformers.utils.fx", reason="this transformers has no tracer of its own")
    ours, theirs = both
    try:
        fx.symbolic_trace(theirs, input_names=["input_ids"], disable_check=True)
    except Exception as error:
        pytest.skip(f"the library's own class is not traced here either: {type(error).__name__}")
    traced = fx.symbolic_trace(ours if which == "ours" else theirs, input_names=["input_ids"], disable_check=True)
    with torch.no_grad():
        torch.testing.assert_close(traced(input_ids=IDS)["logits"], ours(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("part", ["model", "layer"])
def test_traced_by_make_fx(both, part):
    """`torch.fx` at the level of operators: the graph computes what was traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    ours, theirs = both
    if part == "model":
        function, example = lambda ids: ours(ids, token_type_ids=TYPES, use_cache=False).logits, IDS
    else:
        hidden, positions, _ = part_arguments(theirs)
        cos_sin = ours.model.rotary_emb(hidden, positions)
        layer = ours.model.L_module.layers[0]
        function, example = lambda hidden: layer(hidden, position_embeddings=cos_sin, attention_mask=None), hidden
    graph = make_fx(function)(example)
    torch.testing.assert_close(graph(example), function(example), atol=1e-5, rtol=1e-5)
