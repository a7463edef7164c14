"""Language experts: identity, routing, losses, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import multilingual_whisper
from safetensors import safe_open

from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.search import decode
from efficient_asr.techniques.clsr.experts import ExpertSettings, gate_budget_loss, language_code
from efficient_asr.techniques.clsr.model import CLSRWhisper, add_experts
from efficient_asr.techniques.clsr.network import DistilWhisperForConditionalGeneration
from efficient_asr.utils.errors import UserError

LENGTHS = torch.tensor([32000, 20000, 9000])
SETTINGS = [ExpertSettings(), ExpertSettings(rank=3), ExpertSettings(layers=["encoder.2", "decoder.1"])]


@pytest.fixture
def plain() -> Whisper:
    return multilingual_whisper(seed=1)


@pytest.fixture
def wavs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 32000) * 0.1 * (torch.arange(32000) < LENGTHS[:, None])


def prompts(model: Whisper, *languages: str) -> torch.Tensor:
    """Return tokens that begin with the prompt of each language."""
    torch.manual_seed(3)
    tokens = torch.randint(0, 300, (len(languages), 9))
    for row, language in zip(tokens, languages, strict=True):
        row[:4] = torch.tensor(model.labels.prompt(language, DecodingOptions()))
    return tokens


def logits(model: Whisper, wavs: torch.Tensor, *languages: str) -> torch.Tensor:
    with torch.no_grad():
        return model(wavs, LENGTHS, prompts(model, *languages))


def experts_of(
    plain: Whisper, *languages: str, settings: ExpertSettings | None = None, seed: int | None = None
) -> CLSRWhisper:
    """Return a copy of a Whisper with experts; with a seed ones that differ from the shared blocks, and gates of either kind."""
    model = add_experts(copy.deepcopy(plain), list(languages), settings or ExpertSettings(), 0.2)
    if seed is not None:
        torch.manual_seed(seed)
        for language in model.network.languages:
            for part in model.network.expert(language).values():
                for parameter in part.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
    return model


def set_gates(model: CLSRWhisper, value: float) -> None:
    """Open (1) or close (-1) every gate."""
    for language in model.network.languages:
        for part in model.network.expert(language).values():
            torch.nn.init.zeros_(part.gate_in.weight)
            torch.nn.init.ones_(part.gate_in.bias)
            torch.nn.init.constant_(part.gate_out.weight, value)


@pytest.mark.parametrize("settings", SETTINGS)
def test_untrained_experts_with_open_gates_change_nothing(
    plain: Whisper, wavs: torch.Tensor, settings: ExpertSettings
) -> None:
    model = experts_of(plain, "de", "fr", settings=settings)
    assert torch.equal(logits(model, wavs, "de", "de", "de"), logits(plain, wavs, "de", "de", "de"))
    assert sum(int(count[:, 0].sum()) for count in model.routing.counts.values()) > 0  # they did answer
    torch.testing.assert_close(
        logits(model, wavs, "de", "fr", "nl"), logits(plain, wavs, "de", "fr", "nl"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_closed_gates_change_nothing(plain: Whisper, wavs: torch.Tensor, settings: ExpertSettings) -> None:
    model = experts_of(plain, "de", settings=settings, seed=5)
    trained = logits(model, wavs, "de", "de", "de")
    assert not torch.allclose(trained, logits(plain, wavs, "de", "de", "de"))
    set_gates(model, -1.0)
    assert torch.equal(logits(model, wavs, "de", "de", "de"), logits(plain, wavs, "de", "de", "de"))


def test_a_language_without_expert_takes_the_shared_blocks(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", seed=5)
    assert torch.equal(logits(model, wavs, "en", "nl", "fr"), logits(plain, wavs, "en", "nl", "fr"))


def test_a_batch_may_mix_languages(plain: Whisper, wavs: torch.Tensor) -> None:
    """Each utterance comes out as it does alone, whoever its mates are."""
    model = experts_of(plain, "de", "fr", seed=5)
    mixed = logits(model, wavs, "de", "en", "fr")
    tokens = prompts(model, "de", "en", "fr")
    for row in range(3):
        with torch.no_grad():
            alone = model(wavs[row : row + 1], LENGTHS[row : row + 1], tokens[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=2e-5)


def test_a_token_is_computed_by_expert_or_shared_block_as_its_gate_says(plain: Whisper) -> None:
    model = experts_of(plain, "de", seed=5)
    block = model.network.blocks["encoder", 0]
    expert = block.experts["de"]
    x = torch.randn(2, 7, 16)
    model.routing.set("encoder", ["de", "en"])
    with torch.no_grad():
        found = block(x)
        hidden = torch.relu(x[0] @ expert.gate_in.weight.T + expert.gate_in.bias) @ expert.gate_out.weight[0]
        own = expert.fc2(block.activation_fn(expert.fc1(x[0])))
        shared = block.fc2(block.activation_fn(block.fc1(x)))
    assert 0 < int((hidden >= 0).sum()) < 7
    torch.testing.assert_close(found[0], torch.where((hidden >= 0)[:, None], own, shared[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], shared[1], rtol=0, atol=1e-6)
    assert model.routing.counts["encoder", 0].tolist() == [[int((hidden >= 0).sum()), 7], [0, 0]]


def test_a_low_rank_expert_is_its_closed_form(plain: Whisper) -> None:
    model = experts_of(plain, "de", settings=ExpertSettings(rank=3), seed=5)
    block = model.network.blocks["decoder", 1]
    expert = block.experts["de"]
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    w1 = block.fc1.weight.double() + expert.fc1[1].weight.double() @ expert.fc1[0].weight.double()
    w2 = block.fc2.weight.double() + expert.fc2[1].weight.double() @ expert.fc2[0].weight.double()
    expected = torch.nn.functional.gelu(x @ w1.T + block.fc1.bias.double()) @ w2.T + block.fc2.bias.double()
    block.double()
    torch.testing.assert_close(block.ffn(x, expert.eval()), expected)


def test_training_mixes_with_noise_that_grows_with_the_step(plain: Whisper) -> None:
    model = experts_of(plain, "de", seed=5).train()
    block, routing = model.network.blocks["encoder", 0], model.routing
    expert, x = block.experts["de"], torch.randn(1, 6, 16)
    expert.eval()  # no dropout
    routing.skip_gate_prob = 0.0
    for progress in (0.0, 0.5, 1.0, 3.0):
        routing.set("encoder", "de")
        routing.progress = progress
        torch.manual_seed(11)
        torch.rand(())  # whether to skip
        noise = torch.randn(1, 6)
        gate = torch.sigmoid(expert.gate(x) + 5 * min(progress, 1.0) * noise)[..., None]
        expected = gate * block.ffn(x, expert) + (1 - gate) * block.ffn(x)
        torch.manual_seed(11)
        torch.testing.assert_close(block(x), expected)


def test_budget_counts_real_frames_of_layers_that_did_not_skip(plain: Whisper) -> None:
    model = experts_of(plain, "de", seed=5).train()
    routing, blocks = model.routing, model.network.blocks
    routing.skip_gate_prob = 0.0
    x, expected = torch.randn(2, 6, 16), []
    routing.set("encoder", ["de", "en"], torch.tensor([4, 6]))
    for place in (("encoder", 0), ("encoder", 1)):
        expert = blocks[place].experts["de"].eval()
        blocks[place](x)
        expected += torch.sigmoid(expert.gate(x[0, :4])).tolist()
    mean = sum(expected) / 8
    assert gate_budget_loss(routing, 0.3).item() == pytest.approx(abs(mean - 0.3), rel=1e-5)
    assert gate_budget_loss(routing, 0.3).item() == 0.0  # the step is forgotten
    routing.skip_gate_prob = 1.0
    assert torch.equal(blocks["encoder", 0](x), blocks["encoder", 0].ffn(x))
    assert routing.gates == []


def test_only_experts_learn_and_each_from_its_language(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr").train()
    model.routing.skip_gate_prob = 0.0
    before = {name: value.clone() for name, value in plain.network.state_dict().items()}
    model(wavs[:2], LENGTHS[:2], prompts(model, "de", "en")).sum().backward()
    for name, parameter in model.network.named_parameters():
        assert parameter.requires_grad == (".experts." in name), name
        has = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        if ".experts.de." in name and "gate_in" not in name:  # behind a zero gate_out
            assert has, name
        if ".experts.fr." in name:
            assert not has, name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    model.eval()
    assert torch.equal(logits(model, wavs, "en", "nl", "en"), logits(plain, wavs, "en", "nl", "en"))
    assert all(torch.equal(before[name], value) for name, value in plain.network.state_dict().items())


def test_expert_files_hold_one_language_and_give_the_same_transcripts(
    plain: Whisper, wavs: torch.Tensor, tmp_path: Path
) -> None:
    model = experts_of(plain, "de", "fr", seed=5)
    path = model.network.save_expert("german", tmp_path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert path.name == "expert.german.safetensors"
    assert names == {
        f"{side}.layers.{i}.{part}" for (side, i), e in model.network.expert("de").items() for part in e.state_dict()
    }
    plain.save(tmp_path / "plain")
    fresh = DistilWhisperForConditionalGeneration.from_pretrained(tmp_path / "plain").eval()
    fresh.load_experts("german", tmp_path)
    other = CLSRWhisper(fresh, plain.tokenizer).eval()
    torch.testing.assert_close(
        logits(model, wavs, "de", "de", "en"), logits(other, wavs, "de", "de", "en"), rtol=0, atol=1e-5
    )
    texts = [WhisperTranscriber(m, "de").transcribe(wavs, LENGTHS / 32000) for m in (model, other, plain)]
    assert [t.text for t in texts[0]] == [t.text for t in texts[1]]
    assert [t.text for t in texts[0]] != [t.text for t in texts[2]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_whole_is_saved_and_loaded(
    plain: Whisper, wavs: torch.Tensor, tmp_path: Path, settings: ExpertSettings
) -> None:
    model = experts_of(plain, "de", "fr", settings=settings, seed=5)
    model.save(tmp_path / "model", {"technique": "clsr", "variant": "x", "details": {"megabytes_per_language": 1.0}})
    loaded = Whisper.from_source(str(tmp_path / "model"))
    assert isinstance(loaded, CLSRWhisper) and loaded.network.languages == ["de", "fr"]
    assert (loaded.technique, loaded.label, loaded.history["trained"]["megabytes_per_language"]) == ("clsr", "x", 1.0)
    for (name, a), (other, b) in zip(
        model.network.state_dict().items(), loaded.network.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    # not bit for bit: a product's last digit depends on where in memory its factors lie
    torch.testing.assert_close(
        logits(model, wavs, "de", "fr", "en"), logits(loaded, wavs, "de", "fr", "en"), rtol=0, atol=1e-5
    )
    from transformers import WhisperForConditionalGeneration

    other = WhisperForConditionalGeneration.from_pretrained(tmp_path / "model")  # any program reads it as the plain one
    assert all(torch.equal(value, plain.network.state_dict()[name]) for name, value in other.state_dict().items())


def test_switching_back_and_forth_leaves_no_trace(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr", seed=5)
    first = [logits(model, wavs, a, a, a) for a in ("de", "fr", "en")]
    model.network.add_language("nl")
    model.network.set_language_task("nl", task="translate")
    model.network.set_language_task(None)
    model.network.remove_experts("nl")
    again = [logits(model, wavs, a, a, a) for a in ("en", "fr", "de")][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    model.network.remove_experts("german")
    assert torch.equal(logits(model, wavs, "de", "de", "de"), logits(plain, wavs, "de", "de", "de"))
    assert torch.equal(logits(model, wavs, "fr", "fr", "fr"), first[1])
    with pytest.raises(UserError, match="de"):
        model.network.set_language_task("de")


def test_generate_does_not_remember_who_spoke_before(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr", seed=5)
    features = model.features(wavs, LENGTHS)
    with torch.no_grad():
        fresh = model.network.generate(features[:1], max_new_tokens=6)
        decode(
            model,
            model.encode(wavs, LENGTHS, languages=["de", "fr", "en"]),
            ["de", "fr", "en"],
            DecodingOptions(max_new_tokens=4),
        )
        assert torch.equal(model.network.generate(features[:1], max_new_tokens=6), fresh)
        each = [
            model.network.generate(features[i : i + 1], language=a, max_new_tokens=6)[0]
            for i, a in enumerate(("de", "fr", "en"))
        ]
        together = model.network.generate(features, language=["de", "<|fr|>", "english"], max_new_tokens=6)
        assert [row.tolist() for row in together] == [row.tolist() for row in each]


def test_generate_leaves_translations_to_the_shared_decoder(plain: Whisper, wavs: torch.Tensor) -> None:
    model, routed = experts_of(plain, "de", seed=5), []
    model.network.model.decoder.register_forward_pre_hook(lambda *_: routed.append(dict(model.routing.languages)))
    model.network.set_language_task("de")
    features = model.features(wavs, LENGTHS)
    for task, decoder in (("translate", None), ("transcribe", "de")):
        model.network.generate(features, task=task, max_new_tokens=4)
        assert routed and all(languages == {"encoder": "de", "decoder": decoder} for languages in routed)
        routed.clear()
    assert model.routing.languages == {"encoder": "de", "decoder": "de"}


def test_a_batch_that_is_taken_apart_is_refused_rather_than_routed_wrongly(plain: Whisper, wavs: torch.Tensor) -> None:
    """transformers drops recordings that are done from a batch of long ones, and says nobody which."""
    model = experts_of(plain, "de", "fr", seed=5)
    with model.routing.using("encoder", ["de", "fr", "de"]):
        model.network.model.encoder(model.features(wavs, LENGTHS))
        with pytest.raises(UserError, match="call generate once per language"):
            model.network.model.encoder(model.features(wavs[:2], LENGTHS[:2]))
    assert model.routing.languages["encoder"] is None
    long = torch.cat([model.features(wavs, LENGTHS)] * 2, dim=-1)
    mask = torch.ones(3, long.shape[-1], dtype=torch.long)
    mask[1:, long.shape[-1] // 2 :] = 0  # these are done earlier
    long[1:, :, long.shape[-1] // 2 :] = 0
    options = {"attention_mask": mask, "return_timestamps": True, "max_new_tokens": 6}
    with pytest.raises(UserError, match="call generate"):
        model.network.generate(long, language=["de", "fr", "de"], **options)
    model.network.generate(long, language=["de", "de", "de"], **options)  # of one language it may


def test_transcribing_leaves_the_chosen_expert_alone(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr", seed=5)
    model.network.set_language_task("de")
    features, tokens = model.features(wavs, LENGTHS), prompts(model, "de", "de", "de")
    with torch.no_grad():
        before = model.network(features, decoder_input_ids=tokens).logits
        encoded = model.encode(wavs[:1], LENGTHS[:1], languages=["fr"])
        decode(model, encoded, ["fr"], DecodingOptions(max_new_tokens=4))
        model.language_of(wavs[0])
        assert torch.equal(model.network(features, decoder_input_ids=tokens).logits, before)


def test_a_plain_forward_takes_batches_of_any_size(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", seed=5)
    model.network.set_language_task("german")
    features, tokens = model.features(wavs, LENGTHS), prompts(model, "de", "de", "de")
    with torch.no_grad():
        alone = model.network(features[:1], decoder_input_ids=tokens[:1]).logits
        together = model.network(features, decoder_input_ids=tokens).logits
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=2e-5)


def test_autocast_chooses_one_type_for_a_mixed_batch(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr", seed=5)
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(wavs, LENGTHS, prompts(model, "de", "fr", "en")).isfinite().all()


def test_a_failed_load_leaves_the_old_expert(plain: Whisper, wavs: torch.Tensor, tmp_path: Path) -> None:
    model = experts_of(plain, "de", seed=5)
    before = logits(model, wavs, "de", "de", "de")
    experts_of(multilingual_whisper(seed=1, d_model=24), "de").network.save_expert("de", tmp_path)
    with pytest.raises(UserError, match="not an expert for this Whisper"):
        model.network.load_experts("de", tmp_path)
    assert torch.equal(logits(model, wavs, "de", "de", "de"), before)


def test_taken_apart_it_is_a_plain_whisper(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", seed=5)
    model.network.unwrap()
    assert set(model.network.state_dict()) == set(plain.network.state_dict())
    assert torch.equal(logits(model, wavs, "de", "de", "de"), logits(plain, wavs, "de", "de", "de"))


def published(model: CLSRWhisper, language: str, name: str) -> dict[str, torch.Tensor]:
    """Return an expert in the layout of the published files: keys of the full model."""
    state = {}
    for (side, i), part in model.network.expert(language).items():
        for key, value in part.state_dict().items():
            module, _, rest = key.partition(".")
            inner = f"{module}.{name}.{rest}" if module.startswith("gate") else f"proj.{name}.{module}.{rest}"
            state[f"model.{side}.layers.{i}.ffn_clsr.{inner}"] = value.clone()
    return state


@pytest.mark.parametrize("name", ["german", "de"])
def test_published_expert_files_are_read(plain: Whisper, wavs: torch.Tensor, tmp_path: Path, name: str) -> None:
    model = experts_of(plain, "de", seed=5)
    torch.save(published(model, "de", name), tmp_path / "expert.german.bin")
    plain.save(tmp_path / "plain")
    network = DistilWhisperForConditionalGeneration.from_pretrained(tmp_path / "plain")
    network.load_experts("german", tmp_path)
    loaded = CLSRWhisper(network, plain.tokenizer).eval()
    torch.testing.assert_close(
        logits(model, wavs, "de", "de", "de"), logits(loaded, wavs, "de", "de", "de"), rtol=0, atol=1e-5
    )


def test_published_experts_make_a_folder_for_the_scripts(plain: Whisper, wavs: torch.Tensor, tmp_path: Path) -> None:
    """The three lines of recipes/clsr/README.md."""
    model = experts_of(plain, "de", seed=5)
    torch.save(published(model, "de", "german"), tmp_path / "expert.german.bin")
    plain.save(tmp_path / "plain")
    own = CLSRWhisper.from_source(str(tmp_path / "plain"))
    own.network.load_experts(["german"], tmp_path)
    own.save(tmp_path / "own")
    found = Whisper.from_source(str(tmp_path / "own"))
    assert type(found) is CLSRWhisper and found.network.languages == ["de"]
    torch.testing.assert_close(
        logits(model, wavs, "de", "fr", "de"), logits(found, wavs, "de", "fr", "de"), rtol=0, atol=1e-5
    )


def test_a_pickle_in_an_expert_file_is_not_executed(plain: Whisper, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model.encoder.layers.0.ffn_clsr.gate_out.german.weight": Evil()}, tmp_path / "expert.german.bin")
    model = experts_of(plain, "fr")
    with pytest.raises(UserError, match="execute code"):
        model.network.load_experts("german", tmp_path)
    assert not (tmp_path / "executed").exists()
    assert model.network.languages == ["fr"]


def test_the_published_model_loads_with_its_shared_blocks(plain: Whisper, wavs: torch.Tensor, tmp_path: Path) -> None:
    """Its weights have names of their own: ffn_clsr.proj.shared."""
    from safetensors.torch import load_file, save_file

    plain.save(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {
        key.replace(".fc1.", ".ffn_clsr.proj.shared.fc1.").replace(".fc2.", ".ffn_clsr.proj.shared.fc2."): value
        for key, value in weights.items()
    }
    assert set(renamed) != set(weights)
    save_file(renamed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = CLSRWhisper(
        DistilWhisperForConditionalGeneration.from_pretrained(tmp_path / "model"), plain.tokenizer
    ).eval()
    assert torch.equal(logits(model, wavs, "de", "de", "de"), logits(plain, wavs, "de", "de", "de"))


@pytest.mark.parametrize(
    ("language", "folder", "message"),
    [
        ("calatan", None, "catalan"),
        ("german", "empty", "expert.german.safetensors"),
        ("german", "garbage", "damaged"),
        ("german", "wrong language", "not an expert for german"),
        ("german", "another size", "not an expert for this Whisper"),
    ],
)
def test_bad_expert_files(plain: Whisper, tmp_path: Path, language: str, folder: str | None, message: str) -> None:
    path = tmp_path / "expert.german.safetensors"
    if folder == "garbage":
        path.write_bytes(b"garbage")
    if folder == "wrong language":
        experts_of(plain, "fr").network.save_expert("fr", tmp_path).rename(path)
    if folder == "another size":
        experts_of(multilingual_whisper(seed=1, d_model=24), "de").network.save_expert("de", tmp_path)
    model = experts_of(plain, "fr")
    with pytest.raises(UserError, match=message):
        model.network.load_experts(language, tmp_path)
    assert model.network.languages == ["fr"]


@pytest.mark.parametrize(
    "options", [{"layers": "encodr"}, {"layers": ["encoder.3"]}, {"layers": []}, {"rank": 0}, {"gate_dim": 0}]
)
def test_settings_that_make_no_sense(plain: Whisper, options: dict) -> None:
    with pytest.raises(UserError):
        experts_of(plain, "de", settings=ExpertSettings(**options))


def test_language_names() -> None:
    assert [language_code(a) for a in ("Catalan", "ca", "castilian")] == ["ca", "ca", "es"]
    with pytest.raises(UserError, match="catalan"):
        language_code("calatan")


def test_gate_usage_is_counted_and_beams_follow_their_utterance(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr", seed=5)
    encoded = model.encode(wavs, LENGTHS, languages=["de", "en", "fr"])
    for beams in (1, 3):
        found = decode(model, encoded, ["de", "en", "fr"], DecodingOptions(num_beams=beams, max_new_tokens=5))
        assert "gate_usage" not in found[1].details
        usage = found[0].details["gate_usage"]
        assert usage["encoder.0"][1] == 100 and found[2].details["gate_usage"]["encoder.1"][1] == 28
        assert usage["decoder.0"][1] >= 5 and all(0 <= a <= b for a, b in usage.values())
    alone = decode(
        model,
        model.encode(wavs[:1], LENGTHS[:1], languages=["de"]),
        ["de"],
        DecodingOptions(num_beams=3, max_new_tokens=5),
    )
    found = decode(model, encoded, ["de", "en", "fr"], DecodingOptions(num_beams=3, max_new_tokens=5))
    assert alone[0].tokens == found[0].tokens
    summary = model.summary(
        [
            {"gate_usage": {"decoder.0": [1, 2], "encoder.1": [3, 4]}},
            {"segments": [{"gate_usage": {"decoder.0": [2, 2]}}]},
            {},
        ]
    )
    assert summary == {"gate_usage": {"encoder.1": 0.75, "decoder.0": 0.75}}
    assert model.summary([{}]) == {}


def test_gate_usage_does_not_depend_on_batch_mates(plain: Whisper, wavs: torch.Tensor) -> None:
    """Shorter texts end earlier; what is computed for them while others go on is not counted."""
    model, options = experts_of(plain, "de", "fr", seed=5), DecodingOptions(max_tokens_per_s=4.0)
    languages = ["de", "fr", "de"]
    found = decode(model, model.encode(wavs, LENGTHS, languages=languages), languages, options)
    assert len({len(each.tokens) for each in found}) > 1
    for i, each in enumerate(found):
        row = slice(i, i + 1)
        encoded = model.encode(wavs[row], LENGTHS[row], languages=languages[row])
        (alone,) = decode(model, encoded, languages[row], options)
        assert alone.tokens == each.tokens and alone.details["gate_usage"] == each.details["gate_usage"]


def test_an_unknown_language_is_detected_first(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", "fr", "nl", seed=5)
    expected = plain.detect_languages(plain.first_step(plain.encode(wavs, LENGTHS)))
    encoded = model.encode(wavs, LENGTHS, languages=[None, "en", None])
    assert encoded.languages == [expected[0], "en", expected[2]]
    known = model.encode(wavs, LENGTHS, languages=encoded.languages)
    assert torch.equal(encoded.states, known.states)


def test_translation_leaves_the_decoder_to_the_shared_blocks(plain: Whisper, wavs: torch.Tensor) -> None:
    model = experts_of(plain, "de", seed=5)
    encoded = model.encode(wavs[:1], LENGTHS[:1], languages=["de"])
    (found,) = decode(model, encoded, ["de"], DecodingOptions(task="translate", max_new_tokens=4))
    assert {place.split(".")[0] for place in found.details["gate_usage"]} == {"encoder"}


def test_the_published_example(plain: Whisper, wavs: torch.Tensor, tmp_path: Path) -> None:
    """The interactive example of the original README, with our import and local folders."""
    from transformers import WhisperProcessor

    experts_of(plain, "de", seed=5).save(tmp_path / "model")
    reference = WhisperTranscriber(Whisper.from_source(str(tmp_path / "model")), "de", DecodingOptions(suppress=False))

    processor = WhisperProcessor.from_pretrained(tmp_path / "model")
    model = DistilWhisperForConditionalGeneration.from_pretrained(tmp_path / "model")
    language = "german"
    model.load_experts(language)
    model.set_language_task(language=language, task="transcribe")
    model.config.forced_decoder_ids = processor.get_decoder_prompt_ids(language=language, task="transcribe")
    input_features = processor(wavs[1, :20000].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    predicted_ids = model.generate(input_features)
    transcription = processor.batch_decode(predicted_ids, skip_special_tokens=True)

    expected = reference.transcribe(wavs[1:2, :20000], torch.ones(1))[0].text
    assert transcription[0].strip() == expected
    with torch.no_grad():
        own = plain.network.generate(input_features, language="de", task="transcribe")
    assert own.tolist() != predicted_ids.tolist()


def test_dropout_of_a_gate_is_on_its_input_in_training(plain: Whisper) -> None:
    expert = next(iter(experts_of(plain, "ca", seed=5).network.expert("ca").values()))
    x = torch.randn(4, expert.gate_in.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(expert.eval().gate(x, 0.5), expert.eval().gate(x))
    assert torch.equal(expert.train().gate(x, 0.0), expert.eval().gate(x))
    assert not torch.equal(expert.train().gate(x, 0.5), expert.eval().gate(x))
