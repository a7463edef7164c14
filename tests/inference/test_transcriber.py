from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import efficient_asr
from efficient_asr.data import pad_wavs
from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.language_model import LanguageModel
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.utils.errors import UserError

ARPA = Path(efficient_asr.__file__).parent / "assets" / "mini.arpa"


def acoustics(
    text: str, labels: CharacterLabels, confusions: dict[int, tuple[str, float]] | None = None
) -> torch.Tensor:
    """Log-probabilities [1, frames, labels] of a text, a blank behind each character; some characters confused."""
    rows = []
    for position, character in enumerate(text):
        probs = torch.full((len(labels),), 1e-4)
        probs[labels.index[character]] = 0.9
        if confusions and position in confusions:
            other, share = confusions[position]
            probs[labels.index[character]], probs[labels.index[other]] = 0.9 * (1 - share), 0.9 * share
        blank = torch.full((len(labels),), 1e-4)
        blank[0] = 0.97
        rows += [probs, blank]
    return torch.stack(rows).div(torch.stack(rows).sum(1, keepdim=True)).log()[None]


def test_model_folder_to_text(tmp_path: Path, tiny_ctc: CTCModel, wavs: list[torch.Tensor]) -> None:
    tiny_ctc.save(tmp_path)
    transcriber = efficient_asr.load_transcriber(str(tmp_path))
    together = transcriber.transcribe(*pad_wavs(wavs))
    for wav, transcript in zip(wavs, together, strict=True):
        assert transcriber.transcribe(wav[None], torch.ones(1))[0].text == transcript.text
    assert transcriber.parameters_count() == sum(p.numel() for p in tiny_ctc.parameters())


def test_a_batch_on_the_cpu_is_cut_where_the_cache_ends(
    tiny_ctc: CTCModel, wavs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    transcriber = CTCTranscriber(tiny_ctc)
    whole = [found.text for found in transcriber.transcribe(*pad_wavs(wavs))]
    assert transcriber._pieces(torch.tensor([16000] * 8)) == [(0, 8)]  # a small model
    monkeypatch.setattr("efficient_asr.inference.ctc.CACHED", 32 * 100)  # 100 frames of this encoder, 2 s
    lengths = torch.tensor([len(wav) for wav in wavs])
    assert transcriber._pieces(lengths) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert transcriber._pieces(torch.tensor([16000, 16000, 16001, 90000, 100])) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert [found.text for found in transcriber.transcribe(*pad_wavs(wavs))] == whole
    transcriber.device = "cuda"
    assert transcriber._pieces(lengths) == [(0, 4)]


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 400])
def test_very_short_audio_gives_a_text(samples: int, tmp_path: Path, tiny_ctc: CTCModel) -> None:
    tiny_ctc.save(tmp_path)
    transcriber = efficient_asr.load_transcriber(str(tmp_path))
    batch = torch.zeros(2, 8000)
    lens = torch.tensor([samples / 8000, 1.0])
    assert transcriber.transcribe(batch, lens)[0].text == "" or samples >= 160


def test_language_model_corrects_what_greedy_mishears(tmp_path: Path) -> None:
    pytest.importorskip("kenlm")
    labels = CharacterLabels(list(" abcdefghijklmnopqrstuvwxyz"))
    heard = "turn on the kitchen lipht"
    log_probs = acoustics(heard, labels, {heard.index("p"): ("g", 0.4)})
    lengths = torch.tensor([log_probs.shape[1]])
    assert greedy_texts(log_probs, lengths, labels) == [heard]
    assert LanguageModel(str(ARPA), labels.vocabulary).decode(log_probs, lengths) == ["turn on the kitchen light"]
    with pytest.raises(UserError, match="--lm_case lower"):  # no word of this model is written so
        LanguageModel(str(ARPA), labels.vocabulary, case="upper")
    upper = LanguageModel(str(ARPA), labels.vocabulary, case="upper", check=False)
    copy = tmp_path / ARPA.name
    copy.write_text(ARPA.read_text() + "\n")
    others = [LanguageModel(str(ARPA), labels.vocabulary), LanguageModel(str(copy), labels.vocabulary), upper]
    assert len({each.identity for each in others}) == 3  # interrupted scores are continued with the same one only
    assert upper.decode(log_probs, lengths) == [heard]


def test_wide_beam_without_weights_gives_the_greedy_words() -> None:
    pytest.importorskip("kenlm")
    rng = random.Random(0)
    labels = CharacterLabels(list(" abcdefghijklmnopqrstuvwxyz"))
    words = "turn on the kitchen light dial one two three zebra xylophone".split()
    lm = LanguageModel(str(ARPA), labels.vocabulary, alpha=0.0, beta=0.0, beam_size=200)
    for _ in range(5):
        text = " ".join(rng.choices(words, k=5))
        log_probs = acoustics(text, labels, {i: ("e", 0.3) for i in range(0, len(text), 4) if text[i] != "e"})
        lengths = torch.tensor([log_probs.shape[1]])
        assert lm.decode(log_probs, lengths) == greedy_texts(log_probs, lengths, labels) == [text]


def test_without_weight_a_known_neighbour_does_not_win() -> None:
    """An unknown word must stay although a word of the model is one letter away."""
    pytest.importorskip("kenlm")
    labels = CharacterLabels(list(" abcdefghijklmnopqrstuvwxyz"))
    heard = "turn off the televusion"
    log_probs = acoustics(heard, labels, {heard.index("televusion") + 5: ("i", 0.1)})
    lengths = torch.tensor([log_probs.shape[1]])
    assert LanguageModel(str(ARPA), labels.vocabulary, alpha=0.0, beta=0.0).decode(log_probs, lengths) == [heard]
    with_model = LanguageModel(str(ARPA), labels.vocabulary).decode(log_probs, lengths)
    assert with_model == ["turn off the television"]


def test_beam_search_does_not_depend_on_batch_mates() -> None:
    pytest.importorskip("kenlm")
    labels = CharacterLabels(list(" abcdefghijklmnopqrstuvwxyz"))
    lm = LanguageModel(str(ARPA), labels.vocabulary)
    texts = ["turn on the hall light", "dial one"]
    single = [acoustics(text, labels) for text in texts]
    batch = torch.full((2, single[0].shape[1], len(labels)), -math.log(len(labels)))
    for i, row in enumerate(single):
        batch[i, : row.shape[1]] = row[0]
    lengths = torch.tensor([row.shape[1] for row in single])
    assert lm.decode(batch, lengths) == texts
    assert lm.decode(batch, torch.tensor([0, 0])) == ["", ""]


def test_language_model_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        LanguageModel(str(tmp_path / "none.arpa"), ["", " ", "a"])
    with pytest.raises(UserError, match="use 'lower' or 'upper'"):
        LanguageModel(str(ARPA), ["", " ", "a"], case="title")
    pytest.importorskip("kenlm")
    (tmp_path / "bad.arpa").write_text("this is no language model\n")
    with pytest.raises(UserError, match="is not a language model"):
        LanguageModel(str(tmp_path / "bad.arpa"), ["", " ", "a"])


def test_what_is_no_model_is_named(tmp_path: Path, ssl_sources: dict[str, str], tiny_ctc: CTCModel) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        efficient_asr.load_transcriber(str(tmp_path))
    with pytest.raises(UserError, match="neither a model folder written by a recipe nor a Whisper model"):
        efficient_asr.load_transcriber(ssl_sources["wavlm-base"])
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        efficient_asr.load_transcriber("no/such-model")
    tiny_ctc.save(tmp_path)
    with pytest.raises(UserError, match="'gamma' is not an option"):
        efficient_asr.load_transcriber(str(tmp_path), gamma=3)


@pytest.mark.real
def test_plain_whisper_transcribes(real_models: Path, real_data: Path) -> None:
    from efficient_asr.data import load_audio

    transcriber = efficient_asr.load_transcriber(str(real_models / "whisper-tiny"), language="en")
    wav = load_audio(real_data / "ljspeech" / "audio" / "LJ001-0002.flac")
    other = load_audio(real_data / "ljspeech" / "audio" / "LJ001-0001.flac")
    alone = transcriber.transcribe(wav[None], torch.ones(1))[0].text
    assert "comparatively modern" in alone
    assert transcriber.transcribe(*pad_wavs([other, wav]))[1].text == alone
    with pytest.raises(UserError, match="does not know 'xx'"):
        efficient_asr.load_transcriber(str(real_models / "whisper-tiny"), language="xx")
