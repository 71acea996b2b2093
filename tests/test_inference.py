"""`optimize_for_inference` on the CPU: the same outputs and the same files from packed weights."""

from __future__ import annotations

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch.nn import Parameter
from transformers import CompileConfig

from .harness import FORWARD_MODES, GENERATE_MODES, NOT_GREEDY, deviation, is_greedy
from .one_answer_models import one_answer_model
from .optimized_models import pack_all, packed_layers, sibling
from .tiny import load_class, tiny_model


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
IDS = torch.tensor([[6, 20, 31, 42, 7], [6, 9, 55, 60, 7]])


@pytest.fixture(scope="module")
def plain():
    return one_answer_model()


@pytest.fixture(scope="module")
def packed():
    return pack_all(one_answer_model())


def test_every_linear_layer_is_packed(packed):
    linear = [module for module in packed.modules() if isinstance(module, torch.nn.Linear)]
    assert packed_layers(packed) == linear
    assert len(linear) == 9
    assert packed.is_optimized_for_inference
    assert packed.num_parameters() == one_answer_model().num_parameters()
    assert (packed.dtype, packed.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("mode", GENERATE_MODES)
def test_generate_gives_the_one_answer(plain, packed, mode):
    answers = GENERATE_MODES[mode](packed)
    assert deviation(plain, answers) < 1e-4
    if mode not in NOT_GREEDY:
        assert is_greedy(plain, answers)


@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_forward_gives_the_one_answer(plain, packed, mode):
    assert deviation(plain, FORWARD_MODES[mode](packed)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_unchanged_within_rounding(dtype):
    plain = tiny_model().to(dtype)
    packed = pack_all(copy.deepcopy(plain))
    assert len(packed_layers(packed)) == 17
    with torch.no_grad():
        wanted, got = plain(IDS).logits.float(), packed(IDS).logits.float()
    assert (wanted - got).norm() / wanted.norm() < (1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_is_whole_and_bit_equal(dtype):
    plain = tiny_model().to(dtype)
    packed = pack_all(copy.deepcopy(plain))
    wanted, got = plain.state_dict(), packed.state_dict()
    assert list(wanted) == list(got)
    for name, tensor in wanted.items():
        assert got[name].layout is torch.strided
        assert torch.equal(tensor, got[name]), name


def test_saved_folder_loads_as_the_plain_one(tmp_path):
    plain = tiny_model()
    pack_all(copy.deepcopy(plain)).save_pretrained(tmp_path)
    loaded = load_class("modeling_hrm_text.HrmTextForCausalLM").from_pretrained(tmp_path)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_parameters_stay_the_same_objects():
    """Packed or not: identity, flags, shapes; and undoing restores them bit for bit."""
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (value, value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    pack_all(model)
    for undone in (False, True):
        if undone:
            model.undo_inference_optimization()
        found = dict(model.named_parameters())
        assert list(found) == list(before)
        for name, (value, copied, flag) in before.items():
            assert found[name] is value and value.requires_grad is flag, name
            assert value.shape == copied.shape and value.dtype is copied.dtype, name
    assert len(packed_layers(model)) == 0 and not model.is_optimized_for_inference
    assert all(torch.equal(value, copied) and type(value) is Parameter for value, copied, _ in before.values())


def trained_parameters(model, optimizer, names=None) -> set[str]:
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("through_train", [True, False])
def test_an_optimizer_made_before_trains_the_same_parameters(through_train):
    model = tiny_model()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)
    expected = trained_parameters(model, optimizer)
    assert len(expected) == 18
    pack_all(model)
    if through_train:
        model.train()
    assert trained_parameters(model, optimizer) == expected


def test_gradients_of_packed_weights_are_those_of_plain_ones():
    plain, packed = tiny_model(), pack_all(tiny_model())
    for model in (plain, packed):
        model(IDS, labels=IDS).loss.backward()
    assert len(packed_layers(packed)) == 17
    for (name, wanted), got in zip(plain.named_parameters(), packed.parameters()):
        assert (wanted.grad is None) == (got.grad is None), name
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def test_second_derivatives_of_packed_weights():
    found = []
    for pack in (False, True):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
        if pack:
            sibling(tiny_model(), "packed_hrm_text").pack_linear(layer)
        first = torch.autograd.grad(layer(x).sin().sum(), (x, layer.weight), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (x, layer.weight, layer.bias))
        found.append([*first, *second])
    for wanted, got in zip(*found):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_frozen_weights_stay_frozen_under_an_adapter():
    peft = pytest.importorskip("peft")
    for packed_first in (True, False):
        model = tiny_model()
        if packed_first:
            pack_all(model)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["gqkv_proj", "down_proj"]))
        if not packed_first:
            pack_all(model.eval().base_model.model)
        assert packed_layers(model)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trained and all("lora" in name for name in trained)
        model.base_model.model.undo_inference_optimization()
        assert {name for name, value in model.named_parameters() if value.requires_grad} == trained


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_adapters_merge_into_packed_weights(dora, merge):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["gqkv_proj", "down_proj"], init_lora_weights=False, use_dora=dora)
    model = peft.get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        pack_all(model.base_model.model)
        assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4)
        merged = getattr(model, merge)() or model
        assert torch.allclose(merged(input_ids=IDS).logits, wanted, atol=1e-4)
    # What no adapter was merged into is packed as before.
    assert packed_layers(model.base_model.model)


def test_a_state_dict_is_assigned(plain):
    model = pack_all(one_answer_model(seed=1))
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-5)
    assert len(packed_layers(model)) == 9


def test_whatever_uses_the_values_sees_the_plain_weight():
    """In place, read, listed, pickled, pruned, parametrized, replaced: the layer is an ordinary one from then on."""
    module = sibling(tiny_model(), "packed_hrm_text")

    def in_place(layer):
        layer.weight.data.mul_(2)

    def replaced(layer):
        layer.weight = Parameter(2 * layer.weight.detach())

    def listed(layer):
        torch._foreach_mul_([layer.weight], 2)

    def pickled(layer):
        layer.weight = pickle.loads(pickle.dumps(layer.weight))
        layer.weight.data *= 2

    def copied(layer):
        layer.weight = copy.deepcopy(layer.weight)
        layer.weight.data += layer.weight.data

    def parametrized(layer):
        class Double(torch.nn.Module):
            def forward(self, weight):
                return 2 * weight

        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Double())

    def moved_by_vector(layer):
        vector = torch.nn.utils.parameters_to_vector([layer.weight])
        torch.nn.utils.vector_to_parameters(2 * vector, [layer.weight])

    def pruned(layer):
        torch.nn.utils.prune.identity(layer, "weight")
        layer.weight_orig.data *= 2

    x = torch.randn(3, 6)
    for change in (in_place, replaced, listed, pickled, copied, parametrized, moved_by_vector, pruned):
        layer = torch.nn.Linear(6, 5, bias=False)
        wanted = 2 * layer(x)
        module.pack_linear(layer)
        with torch.no_grad():
            change(layer)
        assert torch.allclose(layer(x), wanted, atol=1e-5), change.__name__


def test_a_parameter_outlives_its_packed_layer():
    module = sibling(tiny_model(), "packed_hrm_text")
    layer = torch.nn.Linear(6, 5)
    weight, values = layer.weight, layer.weight.detach().clone()
    module.pack_linear(layer)
    del layer
    assert torch.equal(weight.detach(), values) and type(weight) is Parameter


def test_layers_that_are_not_plain_are_left_alone():
    module = sibling(tiny_model(), "packed_hrm_text")

    class Quantized(torch.nn.Linear):
        pass

    class Weight(torch.nn.Parameter):
        pass

    subclass, wrapped, offloaded, half, tied = (torch.nn.Linear(6, 5) for _ in range(5))
    subclass.__class__ = Quantized
    wrapped.weight = Weight(wrapped.weight.detach())
    offloaded.forward = lambda x: x
    half.half()
    other = torch.nn.Linear(6, 5)
    other.weight.data = tied.weight.data  # one memory under two parameters
    layers = torch.nn.ModuleList([subclass, wrapped, offloaded, half, tied, other, torch.nn.Linear(6, 5)])
    assert list(module.packable(layers)) == [layers[-1]]


def test_torch_saves_and_loads_a_packed_model(packed, tmp_path):
    torch.save(packed, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, packed(IDS).logits)
    assert all(torch.equal(value, state[name]) for name, value in one_answer_model().state_dict().items())
    assert len(packed_layers(packed)) == len(packed_layers(twin)) == 9


def test_threads_generate_on_one_packed_model(plain, packed):
    call = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompts = [torch.tensor([[6, 20 + i, 31, 42, 7]]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda ids: packed.generate(ids, token_type_ids=torch.ones_like(ids), **call), prompts))
    for ids, answer in zip(prompts, got):
        assert torch.equal(answer, plain.generate(ids, token_type_ids=torch.ones_like(ids), **call))


def test_compilers_step_around_packed_layers(packed):
    with torch.no_grad():
        wanted = packed(IDS).logits
        got = torch.compile(packed, backend="eager")(IDS).logits
    torch._dynamo.reset()
    assert torch.allclose(got, wanted, atol=1e-5) and len(packed_layers(packed)) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_the_plain_layer(dtype):
    layer, x = torch.nn.Linear(6, 5).to(dtype), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        wanted = layer(x)
        sibling(tiny_model(), "packed_hrm_text").pack_linear(layer)
        got = layer(x)
    assert got.dtype is wanted.dtype and torch.equal(got, wanted)


def test_a_packed_weight_is_the_only_copy():
    model = pack_all(tiny_model(vocab_size=128, hidden_size=256, intermediate_size=512))
    for module in packed_layers(model):
        held = (*module.__dict__.values(), *module._parameters.values(), *module._buffers.values())
        tensors = [value for value in held if isinstance(value, torch.Tensor)]
        assert len(tensors) == 1 and tensors[0] is module.weight
        size = torch.ops.mkldnn._nbytes(module.weight._packed)
        assert size <= 1.1 * module.weight.numel() * module.weight.element_size()
        with torch._C.DisableTorchFunctionSubclass():
            assert module.weight.untyped_storage().nbytes() == module.weight.element_size()


def test_copies_and_pickles_are_whole(packed):
    with torch.no_grad():
        wanted = packed(IDS).logits
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert len(packed_layers(twin)) == len(packed_layers(packed))
            assert torch.equal(twin(IDS).logits, wanted)


def test_a_state_dict_loads_into_a_packed_model(plain):
    model = pack_all(one_answer_model(seed=1))
    model.load_state_dict(plain.state_dict())
    assert len(packed_layers(model)) == 9
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-5)


def test_casting_packs_again():
    model = pack_all(tiny_model()).to(torch.bfloat16)
    assert len(packed_layers(model)) == 17
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.double()
    assert packed_layers(model) == []
    with torch.no_grad():
        assert model(IDS).logits.dtype is torch.float64


def test_gradients_reach_the_inputs():
    plain, packed = tiny_model(), pack_all(tiny_model())
    gradients = []
    for model in (plain, packed):
        embeds = plain.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().sum().backward()
        gradients.append(embeds.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_autocast_runs(plain, packed):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = plain(IDS).logits, packed(IDS).logits
    assert (wanted.float() - got.float()).norm() / wanted.float().norm() < 2e-2


def test_training_mode_undoes_it(caplog):
    model = pack_all(tiny_model())
    logging.getLogger("transformers").propagate = True
    model.train()
    assert packed_layers(model) == []
    assert all(value.requires_grad for name, value in model.named_parameters() if not name.endswith("z_L_init"))


def test_resizing_embeddings_undoes_it():
    model = pack_all(tiny_model())
    model.resize_token_embeddings(100)
    assert packed_layers(model) == []
    with torch.no_grad():
        assert model(IDS).logits.shape[-1] == 100


def test_a_shared_weight_stays_plain():
    model = pack_all(tiny_model(tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(packed_layers(model)) == 16


def test_it_runs_plain_without_onednn():
    model = tiny_model()
    with torch.no_grad():
        wanted = model(IDS).logits
        with torch.backends.mkldnn.flags(enabled=False):
            assert model.optimize_for_inference() is model
            assert packed_layers(model) == []
            assert torch.allclose(model(IDS).logits, wanted, atol=1e-5)


def test_a_shape_is_packed_only_where_it_pays():
    pays = sibling(tiny_model(), "packed_hrm_text").packing_pays
    assert pays(torch.zeros(8, 8, dtype=torch.float64)) is False
    weight = torch.randn(64, 48)
    assert isinstance(pays(weight), bool)
    model = tiny_model().optimize_for_inference()
    wanted = {module.weight.shape for module in model.modules() if isinstance(module, torch.nn.Linear)}
    packed = {module.weight.shape for module in packed_layers(model)}
    plain = {module.weight.shape for module in model.modules() if type(module) is torch.nn.Linear}
    assert packed | plain == wanted and not packed & plain


def test_compile_config_runs_uncompiled_on_packed_weights(plain, packed):
    config = CompileConfig(fullgraph=False, dynamic=False)
    config._compile_all_devices = True
    more = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    got = packed.generate(IDS, token_type_ids=torch.ones_like(IDS), **more)
    del more["compile_config"]
    assert torch.equal(got, plain.generate(IDS, token_type_ids=torch.ones_like(IDS), **more))


def test_a_lora_adapter_works_on_packed_weights():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["gqkv_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        pack_all(model.base_model.model)
        assert packed_layers(model)
        assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 5, 24), (0, 24)])
def test_a_packed_layer_equals_a_plain_one(shape):
    module = sibling(tiny_model(), "packed_hrm_text")
    linear = torch.nn.Linear(24, 40, bias=False)
    weight, inputs = linear.weight.detach().clone(), torch.randn(shape)
    module.pack_linear(linear)
    with torch.no_grad():
        got = linear(inputs)
    assert got.shape == (*shape[:-1], 40)
    assert torch.allclose(got, F.linear(inputs, weight), atol=1e-5)
