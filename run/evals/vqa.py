"""Visual question answering with a fusion transformer over frozen patch tokens.

The transformer has new weights. It reads the question beside the patch tokens, and a classifier
answers. The classes are the most frequent answers of the train split, trained by binary
cross-entropy towards the soft accuracy of each (Bottom-Up and Top-Down, arXiv 1707.07998 section
3.3; METER, which FLIP table 7 follows). Accuracy is VQAv2's, over all questions and for each kind.
Beside it stand three that see no image: the most frequent answer of train, that of the question's
kind, that of the very same question. The answers go to RUN/vqa/TAG-SET.jsonl.
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

PRINTED_ANSWERS = 5  # answers that are printed
# Spellings that VQAv2's evaluation treats as the same answer (vqaEval.py of
# github.com/GT-Vision-Lab/VQA).
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
# {a contraction without one of its apostrophes: the contraction}
CONTRACTIONS = {}
for word in CONTRACTED_WORDS:
    for apostrophe in re.finditer("'", word):
        CONTRACTIONS[word[: apostrophe.start()] + word[apostrophe.end() :]] = word
IndexedQuestions = Sequence[tuple[int, Question]]  # each with its image's index
ANNOTATION = "questions"
__all__ = ["ANNOTATION", "Options", "check_model", "check_set", "evaluate", "trains_tower"]


@dataclass(frozen=True)
class Options(ReaderOptions):
    # classes at most: VQAv2's answers that occur nine times (Bottom-Up and Top-Down)
    answers: int = 3129


def check_set(images: Images, options: Options) -> None:
    images.questions(0)
    images.open_split("train").questions(0)
    if options.answers < 1:
        raise ValueError(f"evals: answers={options.answers}: it must be at least 1")


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return accuracy, and frequent, frequent_of_kind, frequent_of_question, which see no image.

    accuracy_KIND and frequent_KIND are those of one kind of questions.
    """
    train = images.open_split("train")
    learned = read_questions(train)
    asked = read_questions(images)

    # The classes: the most frequent of the answers that most people gave to a question.
    usual = [(q, most_frequent(q.answers)) for _, q in learned]
    counts = sort_by_count(Counter(answer for _, answer in usual))
    classes = [answer for answer, _ in counts[: options.answers]]
    numbers = {answer: n for n, answer in enumerate(classes)}

    context = model.cfg.data.context
    pieces = PieceVocabulary(model.tokenizer, (q.text for _, q in learned), context)
    model.log(
        f"vqa {images.name}: {len(classes):,} answers, questions of {len(pieces):,} different"
        " pieces"
    )

    def ids_of(batch: IndexedQuestions) -> Tensor:
        return pad_texts([pieces.ids(q.text) for _, q in batch])

    def losses_of(read: Callable, samples: Tensor, image: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of each question, (questions,), summed over the classes."""
        batch = [learned[s] for s in samples.tolist()]
        targets = torch.zeros(len(batch), len(classes))
        for row, (_, q) in zip(targets, batch):
            for answer in set(q.answers) & numbers.keys():
                row[numbers[answer]] = soft_accuracy(answer, q.answers)
        logits = read(ids_of(batch), image)
        losses = F.binary_cross_entropy_with_logits(logits, to_device(targets), reduction="none")
        return losses.sum(1)

    build = partial(Answerer, len(pieces), context, answers=len(classes))
    owner = [i for i, _ in learned]
    answerer, embedder = train_reader(model, train, options, build, owner, losses_of)

    # Answer the test questions, and print a few.
    image_tokens = patch_tokens(embedder, images)

    def best_class(samples: Tensor) -> Tensor:
        batch = [asked[s] for s in samples.tolist()]
        image = to_device(image_tokens.rows([i for i, _ in batch]))
        return answerer(ids_of(batch), image).argmax(1, keepdim=True)

    best = predict(len(asked), 1, best_class)
    answers = [classes[n] for n in best[:, 0].tolist()]
    for (i, q), answer in list(zip(asked, answers))[:PRINTED_ANSWERS]:
        truth = ", ".join(dict.fromkeys(q.answers))
        model.log(f"  {images.key(i)}: {q.text} {answer}; truth: {truth}")

    def records() -> Iterator[dict]:
        for (i, q), answer in zip(asked, answers):
            yield dict(key=images.key(i), question=q.text, answer=answer, truth=q.answers)

    write_records(model, "vqa", images, records())
    return compute_accuracies(asked, answers, usual)


def read_questions(images: Images) -> list[tuple[int, Question]]:
    """Return (image, question) of a whole split, the answers normalized."""
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
    """Return the most frequent answer, of equal ones the first."""
    return Counter(answers).most_common(1)[0][0]


def sort_by_count(counts: Counter) -> list[tuple[str, int]]:
    """Return the counts from the most frequent; equals by name, independent of reading order."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def compute_accuracies(
    asked: IndexedQuestions,
    given: Sequence[str],
    usual: Sequence[tuple[Question, str]],
) -> dict[str, float]:
    """Return the accuracies of the given answers, and of guesses without an image.

    usual: the training questions, each with the answer that most people gave.
    """
    groupings = {"": lambda q: "", "_of_kind": lambda q: q.kind, "_of_question": lambda q: q.text}

    # Over all questions.
    right = [soft_accuracy(answer, q.answers) for (_, q), answer in zip(asked, given)]
    values = dict(accuracy=mean(right))
    guessed = {}
    for name, group in groupings.items():
        guess = blind_guesser(usual, group)
        guessed[name] = [soft_accuracy(guess(q), q.answers) for _, q in asked]
        values[f"frequent{name}"] = mean(guessed[name])

    # For each kind.
    for kind in sorted({q.kind for _, q in asked} - {""}):
        name = re.sub(r"\W+", "_", kind)
        indices = [n for n, (_, q) in enumerate(asked) if q.kind == kind]
        values[f"accuracy_{name}"] = mean([right[n] for n in indices])
        values[f"frequent_{name}"] = mean([guessed["_of_kind"][n] for n in indices])
    return values


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def blind_guesser(
    usual: Sequence[tuple[Question, str]], group: Callable[[Question], str]
) -> Callable[[Question], str]:
    """Return a function from a question to the most frequent answer of the question's group.

    Where a group is new, it is the most frequent answer of all.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for q, answer in usual:
        counts[group(q)][answer] += 1
    best = {key: sort_by_count(count)[0][0] for key, count in counts.items()}
    overall = sort_by_count(Counter(answer for _, answer in usual))[0][0]
    return lambda q: best.get(group(q), overall)


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Return VQAv2's accuracy of an answer: min(n / 3, 1), n people having given this answer.

    It is averaged over leaving each person out in turn: 1 where four of ten people agree. Where
    fewer than four were asked, all but one stand for the three; an only answer is the truth.
    """
    if len(answers) == 1:
        return float(answer == answers[0])
    enough = min(3, len(answers) - 1)
    same = sum(a == answer for a in answers)
    return sum(min((same - (a == answer)) / enough, 1.0) for a in answers) / len(answers)


def normalize_answer(answer: str) -> str:
    """Return an answer as VQAv2 compares it.

    It has no punctuation and no articles, numbers are digits, contractions have their apostrophes.
    The original does not change answers on which all people agree; this always normalizes both
    sides.
    """
    text = " ".join(answer.split())
    has_grouped_digits = re.search(r"\d,\d", text)  # 1,000
    bare = text
    for mark in MARKS:
        vanishes = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if vanishes else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)  # periods, but not decimal points
    words = [NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
