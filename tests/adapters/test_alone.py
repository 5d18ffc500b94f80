"""Several adapters on one backbone, one of them active at a time: what it computes, trains, saves, and leaves alone."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from adapters_made import FIRST, IDS, MIXLORA, SECOND, TOPK, base, hooks, logits, randomize, same, values
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

import moelora
from moelora.checkpoints import manifest
from moelora.errors import CheckpointError, ConfigError, UserError
from moelora.mixture import MoELoRAModel
from moelora.passes import Passes


def test_the_active_adapter_alone_decides_bit_for_bit(tmp_path: Path) -> None:
    alone = {path: logits(moelora.from_pretrained(path, base())) for path in (FIRST, SECOND)}
    bare = logits(base())
    model = moelora.from_pretrained(FIRST, base(), adapter_name="one")
    model.load_adapter(SECOND, "other")
    assert (model.adapters, model.active_adapters, model.active_adapter) == (["one", "other"], ["one"], "one")
    assert torch.equal(logits(model), alone[FIRST])
    model.set_adapter("other")
    assert model.active_adapter == "other" and torch.equal(logits(model), alone[SECOND])
    with model.disable_experts():
        assert torch.equal(logits(model), bare)
    model.disable_adapters()
    assert torch.equal(logits(model), bare)
    model.enable_adapters()
    model.set_adapter(["one"])
    assert torch.equal(logits(model), alone[FIRST])
    model.delete_adapter("other")
    assert model.adapters == ["one"] and torch.equal(logits(model), alone[FIRST])
    assert not torch.equal(alone[FIRST], alone[SECOND]) and not torch.equal(alone[FIRST], bare)


def test_a_model_with_an_idle_adapter_looks_like_one_that_has_none(two: MoELoRAModel) -> None:
    alone = moelora.from_pretrained(FIRST, base())
    for model in (two, alone):
        model.train()
    assert list(two.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in two.named_modules()] == [name for name, _ in alone.named_modules()]
    assert [n for n, p in two.named_parameters() if p.requires_grad] == [
        n for n, p in alone.named_parameters() if p.requires_grad
    ]
    assert hooks(two) == hooks(alone) and list(two.containers()) == list(alone.containers())
    assert two.trainable_report() == alone.trainable_report()
    assert two.mixture == alone.mixture


def test_names_that_are_taken_unknown_or_none(two: MoELoRAModel) -> None:
    before = logits(two)
    for call, words in {
        lambda: two.add_adapter("math", TOPK): r"there is an adapter 'math' already: .* delete_adapter\('math'\)",
        lambda: two.load_adapter(SECOND, "chat"): "there is an adapter 'chat' already",
        lambda: two.add_adapter("a.b", TOPK): "adapter name 'a.b': expected letters",
        lambda: two.add_adapter("../x", TOPK): "adapter name '../x': expected letters",
        lambda: two.set_adapter("law"): "adapter 'law' is not known: there are 'chat', 'math'",
        lambda: two.set_adapter([]): r"set_adapter got \[\]: .*disable_experts",
        lambda: two.set_adapter(["chat", "chat"]): "several different ones",
        lambda: two.delete_adapter("law"): "adapter 'law' is not known",
        lambda: two.delete_adapter("chat"): r"no active adapter: call set_adapter with another one first \(math\)",
        lambda: two.delete_adapter(["math", "chat"]): r"no active adapter: use unload\(\)",
        lambda: two.adapter_tensors("law"): "adapter 'law' is not known",
        lambda: two.save_pretrained("nowhere", selected_adapters=["law"]): "adapter 'law' is not known",
        lambda: two.save_pretrained("nowhere", selected_adapters="law"): "adapter 'law' is not known",
        lambda: two.save_pretrained("nowhere", selected_adapters=[]): "is empty: name one of 'chat', 'math'",
        lambda: moelora.attach(two.backbone, TOPK): r"already carries experts .* call add_adapter\(\)",
    }.items():
        with pytest.raises(ConfigError, match=words):
            call()
    assert (two.adapters, two.active_adapters) == (["chat", "math"], ["chat"])
    assert torch.equal(logits(two), before) and not Path("nowhere").exists()


def spoil(folder: Path, damage: str) -> None:
    """Change the last tensor of a checkpoint, and let its manifest agree."""
    tensors = load_file(folder / "moelora.safetensors")
    last = tensors[max(tensors)]
    if damage == "not finite":
        last.view(-1)[-1] = torch.nan
    else:
        tensors[max(tensors)] = last[:-1].clone()
    save_file(tensors, folder / "moelora.safetensors")
    manifest.write(folder)


@pytest.mark.parametrize("damage", ["not finite", "misshapen", "no such folder", "matches no module"])
def test_an_adapter_that_cannot_be_loaded_leaves_the_others_untouched(tmp_path: Path, damage: str) -> None:
    model = randomize(moelora.attach(base(), MIXLORA).eval())
    before, kept = logits(model), values(model, "default")
    modules, count = list(model.named_modules()), hooks(model)
    randomize(moelora.attach(base(), TOPK)).save_pretrained(tmp_path)
    if damage in ("not finite", "misshapen"):
        spoil(tmp_path, damage)
    with pytest.raises((CheckpointError, ConfigError), match=damage):
        if damage == "matches no module":
            model.add_adapter("other", {"sites": [{"target": "nothing", "experts": {"num_experts": 1}}]})
        model.load_adapter(tmp_path / "missing" if damage == "no such folder" else tmp_path, "other")
    assert model.adapters == ["default"] and list(model.named_modules()) == modules and hooks(model) == count
    assert same(values(model, "default"), kept) and torch.equal(logits(model), before)


def test_from_pretrained_that_fails_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    randomize(moelora.attach(base(), TOPK)).save_pretrained(tmp_path)
    spoil(tmp_path, "not finite")
    backbone = base()
    before, modules = logits(backbone), list(backbone.modules())
    with pytest.raises(CheckpointError, match="not finite"):
        moelora.from_pretrained(tmp_path, backbone)
    assert list(backbone.modules()) == modules and torch.equal(logits(backbone), before)
    assert not backbone._forward_hooks and all(parameter.requires_grad for parameter in backbone.parameters())


def test_switching_leaves_nothing_behind(two: MoELoRAModel) -> None:
    def live() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        kinds = (Passes, nn.Module, Tensor)
        counts = [sum(issubclass(type(each), kind) for each in objects) for kind in kinds]
        return counts[0], counts[1], counts[2]

    def round_trip() -> None:
        two.set_adapter("math")
        logits(two)
        two.set_adapter("chat")
        logits(two)

    round_trip()
    expected, before, count = logits(two), live(), hooks(two)
    for _ in range(100):
        round_trip()
    assert live() == before and hooks(two) == count
    assert torch.equal(logits(two), expected)


def test_training_changes_the_active_adapter_alone(two: MoELoRAModel) -> None:
    def train(name: str) -> None:
        two.set_adapter(name)
        two.train()
        parameters = [p for p in two.parameters() if p.requires_grad]
        own = {id(p) for p in two.adapter_tensors(name).values()}
        assert parameters and {id(p) for p in parameters} <= own
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            two(IDS, labels=IDS).loss.backward()
            optimizer.step()
        two.eval()

    frozen = {name: value.clone() for name, value in base().state_dict().items()}
    fresh = {name: values(two, name) for name in two.adapters}
    train("chat")
    trained, answer = values(two, "chat"), logits(two)
    assert not same(trained, fresh["chat"]) and same(values(two, "math"), fresh["math"])
    train("math")
    assert not same(values(two, "math"), fresh["math"]) and same(values(two, "chat"), trained)
    assert all(p.grad is not None for p in two.adapter_tensors("chat").values())
    two.set_adapter("chat")
    assert torch.equal(logits(two), answer)
    assert same({k: v.clone() for k, v in two.unload().state_dict().items()}, frozen)


def test_a_backward_pass_reaches_the_adapter_of_its_forward(two: MoELoRAModel) -> None:
    two.train()
    loss = two(IDS, labels=IDS).loss
    two.set_adapter("math")
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in two.adapter_tensors("chat").values())
    assert all(p.grad is None for p in two.adapter_tensors("math").values())


def test_a_recomputation_under_other_adapters_is_refused(two: MoELoRAModel) -> None:
    two.train()
    two.gradient_checkpointing_enable()
    wanted = {}
    for switched in (False, True):
        two.zero_grad()
        loss = two(IDS, labels=IDS).loss
        if switched:  # there and back again: the modules are those of the forward
            two.set_adapter("math")
            two(IDS, labels=IDS).loss.backward()
            two.set_adapter("chat")
        loss.backward()
        grads = {name: p.grad for name, p in two.adapter_tensors("chat").items()}
        wanted = wanted or {name: grad.clone() for name, grad in grads.items() if grad is not None}
        assert same({name: grad for name, grad in grads.items() if grad is not None}, wanted) and len(wanted) == 8
    loss = two(IDS, labels=IDS).loss
    two.set_adapter("math")
    with pytest.raises(UserError, match=r"other adapters are active .* call backward\(\) first"):
        loss.backward()


def test_a_layer_copied_for_another_adapter_is_checkpointed_too(two: MoELoRAModel) -> None:
    two.gradient_checkpointing_enable()
    two.add_adapter("whole", {"sites": [{**TOPK["sites"][0], "layers": [1]}], "modules_to_save": ["layers.0"]})
    two.set_adapter("whole")
    two.train()
    grads = []
    for _ in range(2):
        two.zero_grad()
        two(IDS, labels=IDS).loss.backward()
        trained = {name: p for name, p in two.adapter_tensors().items() if p.requires_grad}
        grads.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        two.gradient_checkpointing_disable()
    assert same(*grads) and len(grads[0]) > 10


def test_adapters_cannot_change_while_a_forward_runs(two: MoELoRAModel) -> None:
    layer = two.backbone.model.layers[0]
    for change in (
        lambda *_: two.set_adapter("math"),
        lambda *_: two.add_adapter("third", TOPK),
        lambda *_: two.load_adapter(SECOND, "third"),
        lambda *_: two.delete_adapter("math"),
    ):
        handle = layer.register_forward_hook(change)
        for run in (two, two.backbone, lambda ids: two.generate(ids, max_new_tokens=2)):
            with pytest.raises(UserError, match="is running"):
                run(IDS)
        handle.remove()
    assert (two.adapters, two.active_adapters) == (["chat", "math"], ["chat"])


def test_two_adapters_train_one_module_whole(tiny_config: LlamaConfig) -> None:
    tiny_config.num_labels = 3
    backbone = LlamaForSequenceClassification(tiny_config).eval()
    bare = logits(backbone)
    sites = [{"target": "q_proj", "experts": {"num_experts": 1, "r": 2}}]
    model = moelora.attach(backbone, {"sites": sites, "modules_to_save": ["score"]}, adapter_name="one").eval()
    randomize(model)
    model.add_adapter("two", {"sites": sites, "modules_to_save": ["score"]})
    one = logits(model)
    model.set_adapter("two")
    assert torch.equal(logits(model), bare)  # a fresh copy of the frozen head, not of the trained one
    randomize(model, seed=6)
    two = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), one) and not torch.equal(one, two)
    with pytest.raises(ConfigError, match=r"'one' and 'two' cannot be active together: .* at 'score', and a module"):
        model.set_adapter(["one", "two"])
    assert torch.equal(logits(model), one)
    assert logits(model.unload()).equal(bare)


def test_a_stack_that_is_copied_for_an_adapter_brings_no_hooks_with_it() -> None:
    def backbone() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()

    def answer(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(IDS, decoder_input_ids=IDS[:, :3], use_cache=False).logits
        return result

    whole = {"sites": [{"target": "wo", "experts": {"num_experts": 1, "r": 2}}], "modules_to_save": ["encoder"]}
    with pytest.raises(ConfigError, match="lies inside 'encoder'"):
        moelora.attach(backbone(), whole)
    whole["sites"][0]["target"] = "EncDecAttention.q"
    fresh = moelora.attach(backbone(), whole).eval()
    model = moelora.attach(backbone(), {"sites": [{**TOPK["sites"][0], "target": "wo"}]}).eval()
    model.add_adapter("whole", whole)
    model.set_adapter("whole")
    assert hooks(model) == hooks(fresh) and torch.equal(answer(model), answer(backbone()))
    assert sum(isinstance(each, T5ForConditionalGeneration) for each in model.modules()) == 1
    randomize(model)
    model.set_adapter("default")
    assert torch.equal(answer(model), answer(backbone()))


def test_unload_gives_the_backbone_back_whatever_else_there_is(two: MoELoRAModel) -> None:
    names = [name for name, _ in base().named_modules()]
    two.set_adapter("math")
    backbone = two.unload()
    assert [name for name, _ in backbone.named_modules()] == names and not backbone._forward_hooks
    assert torch.equal(logits(backbone), logits(base()))
    for call in (
        lambda: two.set_adapter("chat"),
        lambda: two.add_adapter("third", TOPK),
        lambda: two.load_adapter(SECOND, "third"),
        lambda: two.delete_adapter("chat"),
        lambda: two.active_adapter,
        lambda: two.mixture,
    ):
        with pytest.raises(ConfigError, match="was unloaded"):
            call()
    assert [name for name, _ in backbone.named_modules()] == names


def test_merging_takes_the_active_adapter(two: MoELoRAModel) -> None:
    expected = logits(two)
    assert (logits(two.merge_and_unload()) - expected).abs().max() < 1e-5
