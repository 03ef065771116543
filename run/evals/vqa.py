"""Visual question answering with a fusion transformer over patch tokens.

The transformer has new weights. It reads the question together with the patch tokens, and a
classifier answers. The classes are the most frequent answers of train/. Training minimizes the
binary cross-entropy of each class, whose target is its soft accuracy (Bottom-Up and Top-Down, arXiv
1707.07998 section 3.3; METER, which FLIP table 7 follows).

The accuracy is VQAv2's, over all questions and for each kind of question. It is reported with those
of three guesses without an image: the most frequent answer of train/, that of the question's kind,
and that of the same question. The answers are written to RUN/vqa/TAG-SET.jsonl.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images, Question
from glimpse.model.downstream.decoders import Answerer
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.language import (
    PieceVocabulary,
    ReaderOptions,
    check_model,
    pad_texts,
    patch_tokens,
    predict,
    train_reader,
    trains_tower,
    write_records,
)
from glimpse.run.lib.distributed import to_device

PRINTED_ANSWERS = 5
# Spellings that VQAv2's evaluation (vqaEval.py of github.com/GT-Vision-Lab/VQA) treats as the same
# answer.
DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(n) for n, word in enumerate(DIGITS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED_WORDS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
    """.split()
# {contraction without one of its apostrophes: contraction}
CONTRACTIONS = {}
for word in CONTRACTED_WORDS:
    for apostrophe in re.finditer("'", word):
        CONTRACTIONS[word[: apostrophe.start()] + word[apostrophe.end() :]] = word
IndexedQuestions = Sequence[tuple[int, Question]]  # (index of the image, question)
CONTENT = "questions"
__all__ = ["CONTENT", "Options", "check_model", "check_set", "evaluate", "trains_tower"]


@dataclass(frozen=True)
class Options(ReaderOptions):
    """Options of vqa."""

    # Maximum number of classes: VQAv2's answers that occur nine times (Bottom-Up and Top-Down).
    answers: int = 3129


def check_set(images: Images, options: Options) -> None:
    """Raise ValueError unless test/ and train/ have questions, and options.answers is positive."""
    images.questions(0)
    images.open_split("train").questions(0)
    if options.answers < 1:
        raise ValueError(f"evals: answers={options.answers}: it must be at least 1")


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return accuracy, frequent, frequent_of_kind and frequent_of_question, as fractions.

    The last three are the accuracies of guesses without an image. accuracy_KIND and frequent_KIND
    are those of one kind of question.
    """
    train = images.open_split("train")
    train_questions = read_questions(train)
    test_questions = read_questions(images)

    # 1. The classes are the most frequent of the questions' most frequent answers.
    usual_answers = [(q, most_frequent(q.answers)) for _, q in train_questions]
    counts = sort_by_count(Counter(answer for _, answer in usual_answers))
    classes = [answer for answer, _ in counts[: options.answers]]
    class_indices = {answer: n for n, answer in enumerate(classes)}

    # 2. Train an answerer. A sample is one question about one image.
    context = model.cfg.data.context
    vocabulary = PieceVocabulary(model.tokenizer, (q.text for _, q in train_questions), context)
    model.log(
        f"vqa {images.name}: {len(classes):,} answers, questions of {len(vocabulary):,} different"
        " pieces"
    )

    def question_ids(batch: IndexedQuestions) -> Tensor:
        return pad_texts([vocabulary.ids(q.text) for _, q in batch])

    def compute_losses(
        read: Callable, samples: Tensor, image: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the loss of each question, (questions,), summed over the classes."""
        batch = [train_questions[s] for s in samples.tolist()]
        targets = torch.zeros(len(batch), len(classes))
        for row, (_, q) in zip(targets, batch):
            for answer in set(q.answers) & class_indices.keys():
                row[class_indices[answer]] = soft_accuracy(answer, q.answers)
        logits = read(question_ids(batch), image)
        losses = F.binary_cross_entropy_with_logits(logits, to_device(targets), reduction="none")
        return losses.sum(1)

    build = partial(Answerer, len(vocabulary), context, answers=len(classes))
    image_indices = [i for i, _ in train_questions]
    answerer, token_model = train_reader(
        model, train, options, build, image_indices, compute_losses
    )

    # 3. Answer the test questions, and print a few.
    image_tokens = patch_tokens(token_model, images)

    def best_classes(samples: Tensor) -> Tensor:
        batch = [test_questions[s] for s in samples.tolist()]
        image = to_device(image_tokens.rows([i for i, _ in batch]))
        return answerer(question_ids(batch), image).argmax(1, keepdim=True)

    best = predict(len(test_questions), 1, best_classes)
    answers = [classes[n] for n in best[:, 0].tolist()]
    for (i, q), answer in list(zip(test_questions, answers))[:PRINTED_ANSWERS]:
        truth = ", ".join(dict.fromkeys(q.answers))
        model.log(f"  {images.key(i)}: {q.text} {answer}; truth: {truth}")

    def records() -> Iterator[dict]:
        for (i, q), answer in zip(test_questions, answers):
            yield dict(key=images.key(i), question=q.text, answer=answer, truth=q.answers)

    write_records(model, "vqa", images, records())
    return compute_accuracies(test_questions, answers, usual_answers)


def read_questions(images: Images) -> list[tuple[int, Question]]:
    """Return (index of the image, question) for all questions of a split that have answers.

    The answers are normalized.
    """
    pairs = []
    for i in range(len(images)):
        for q in images.questions(i):
            if q.answers:
                answers = tuple(map(normalize_answer, q.answers))
                pairs.append((i, Question(q.text, answers, q.kind)))
    if not pairs:
        raise ValueError(f"evals: {images.folder}: no questions with answers in {images.split}")
    return pairs


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer; of equally frequent answers, the first."""
    return Counter(answers).most_common(1)[0][0]


def sort_by_count(counts: Counter) -> list[tuple[str, int]]:
    """Sort answers by falling count, and by name where counts are equal."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def compute_accuracies(
    questions: IndexedQuestions,
    answers: Sequence[str],
    usual_answers: Sequence[tuple[Question, str]],
) -> dict[str, float]:
    """Return the accuracies of these answers to the questions, and of guesses without an image.

    usual_answers: the training questions, each with its most frequent answer.
    """
    groupings = {"": lambda q: "", "_of_kind": lambda q: q.kind, "_of_question": lambda q: q.text}

    # 1. Over all questions.
    accuracies = [soft_accuracy(answer, q.answers) for (_, q), answer in zip(questions, answers)]
    values = dict(accuracy=mean(accuracies))
    guess_accuracies = {}
    for name, group in groupings.items():
        guess = blind_guesser(usual_answers, group)
        guess_accuracies[name] = [soft_accuracy(guess(q), q.answers) for _, q in questions]
        values[f"frequent{name}"] = mean(guess_accuracies[name])

    # 2. For each kind of question.
    for kind in sorted({q.kind for _, q in questions} - {""}):
        name = re.sub(r"\W+", "_", kind)
        indices = [n for n, (_, q) in enumerate(questions) if q.kind == kind]
        values[f"accuracy_{name}"] = mean([accuracies[n] for n in indices])
        values[f"frequent_{name}"] = mean([guess_accuracies["_of_kind"][n] for n in indices])
    return values


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def blind_guesser(
    usual_answers: Sequence[tuple[Question, str]], group: Callable[[Question], str]
) -> Callable[[Question], str]:
    """Return a function from a question to the most frequent answer of its group.

    For a group without training questions it is the most frequent of all answers.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for q, answer in usual_answers:
        counts[group(q)][answer] += 1
    best = {key: sort_by_count(count)[0][0] for key, count in counts.items()}
    overall = sort_by_count(Counter(answer for _, answer in usual_answers))[0][0]
    return lambda q: best.get(group(q), overall)


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Return VQAv2's accuracy of an answer, given the answers of several people.

    It is min(n / 3, 1) if n people gave this answer, averaged over leaving out each person in turn.
    So it is 1 if four of ten people agree. With fewer than four people, all but one take the place
    of the three. A single person's answer counts as the truth.
    """
    if len(answers) == 1:
        return float(answer == answers[0])
    enough = min(3, len(answers) - 1)
    same = sum(a == answer for a in answers)
    return sum(min((same - (a == answer)) / enough, 1.0) for a in answers) / len(answers)


def normalize_answer(answer: str) -> str:
    """Return an answer in the form in which VQAv2 compares it.

    It has no punctuation and no articles, numbers are digits, and contractions have their
    apostrophes. VQAv2's code does not normalize answers on which all people agree; this function
    always does.
    """
    text = " ".join(answer.split())
    has_grouped_digits = re.search(r"\d,\d", text)  # e.g. 1,000
    unpunctuated = text
    for mark in MARKS:
        is_removed = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
        unpunctuated = unpunctuated.replace(mark, "" if is_removed else " ")
    unpunctuated = re.sub(r"\.(?!\d)", "", unpunctuated)  # periods, but not decimal points
    words = [NUMBERS.get(word, word) for word in unpunctuated.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
