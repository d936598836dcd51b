"""Problems -> prompts: reasoning-gym tasks or a dataset, with a cursor that can be resumed.

The i-th problem of a source is a pure function of its configuration and i, on every rank and after
every restart, so the cursor is one number. reasoning-gym tasks never end; a dataset is read in
epochs, each in an order of its own.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sapo_megatron.data.datasets import Problem, Unverifiable, read_problems
from sapo_megatron.data.tokenizer import Tokenizer
from sapo_megatron.errors import UserError, hint, one_line, with_type
from sapo_megatron.recipe.schema import DataConfig, TaskConfig
from sapo_megatron.sample import Prompt

logger = logging.getLogger(__name__)

CHUNK = 500
"""Items of one reasoning-gym dataset; a task goes on with another dataset, under another seed.
Some tasks prepare all their items at once, so there cannot be one dataset of endless size."""
PATIENCE = 1000
"""Draws in a row that reasoning-gym tasks may waste before they count as exhausted."""
HASH_ORDERED_TASKS = frozenset(
    {
        "codeio",
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
"""reasoning-gym tasks whose items depend on the order of Python's sets, hence on the process."""


class PromptSource:
    """The prompts of ``data.train``, in order; the same on every rank.

    ``skipped`` counts what was drawn and not used: prompts that are ``too_long``, problems that are
    ``held_out``, and items that their task ``failed`` to make. The ``uid`` of a prompt is its index
    in the source: unique and increasing.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        where: str = "data.train",
        unverifiable: Unverifiable | None = None,
    ) -> None:
        """``max_prompt_length`` in tokens, template included; ``where`` names the source in
        messages; ``unverifiable`` says why an answer is of no use to the reward function.

        Raises UserError for an unknown task, bad options, a missing or malformed file, and for
        conversations that cannot be rendered.
        """
        self._problems = (_Rows if data.train.path else _Tasks)(data, where, unverifiable)
        self._template = data.template if data.train.template is None else data.train.template
        self._apply_chat_template = data.apply_chat_template
        self._tokenizer = tokenizer
        self._max_prompt_length = max_prompt_length
        self._excluded: set[str] = set()
        self._where = where
        self._index = 0
        self.skipped = {"too_long": 0, "held_out": 0, "failed": 0}
        for problem in self._problems.kinds():
            self._tokenize(problem)

    def next(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts. Raises UserError when the source has none that can be used."""
        return [self._draw() for _ in range(n)]

    def exclude(self, texts: Iterable[str]) -> None:
        """Never draw a problem that has one of these texts."""
        self._excluded.update(texts)

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as plain values."""
        return {"index": self._index, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the source that gave ``state`` stood."""
        self._index = state["index"]
        self.skipped = dict(state["skipped"])

    def digest(self) -> str:
        """Stands for the problems and their order, and so for what a place in them means."""
        return self._problems.digest

    def _draw(self) -> Prompt:
        before = dict(self.skipped)
        for _ in range(self._problems.patience):
            index = self._index
            self._index += 1
            problem = self._problems.get(index)
            if problem is None:
                self.skipped["failed"] += 1
            elif problem.text in self._excluded:
                self.skipped["held_out"] += 1
            else:
                tokens = self._tokenize(problem)
                if len(tokens) <= self._max_prompt_length:
                    return Prompt(
                        uid=index,
                        text=problem.text,
                        answer=problem.answer,
                        tokens=tuple(tokens),
                        task=problem.task,
                        entry=problem.entry,
                        thinking=self._tokenizer.decode(tokens[-8:]).rstrip().endswith("<think>"),
                    )
                self._skip_long(index, len(tokens))
        wasted = ", ".join(f"{n - before[why]} {why}" for why, n in self.skipped.items())
        raise UserError(
            f"{self._where}: expected prompts of at most rollout.max_prompt_length = "
            f"{self._max_prompt_length} tokens that are not held out, got none in "
            f"{self._problems.patience} draws ({wasted}); raise it, or add problems, or lower "
            f"eval.num_problems"
        )

    def _tokenize(self, problem: Problem) -> list[int]:
        try:
            tokens = self._encode(problem)
        except UserError as error:
            raise UserError(f"{problem.at}: {error}") from None
        except Exception as error:  # whatever a tokenizer makes of texts and arguments
            raise UserError(f"{problem.at}: cannot be tokenized: {with_type(error, 200)}") from None
        if not tokens:
            raise UserError(
                f"{problem.at}: expected a prompt of at least one token, got none from "
                f"{'the chat template' if self._apply_chat_template else 'the text'}; change it"
            )
        return tokens

    def _encode(self, problem: Problem) -> list[int]:
        text = self._template.replace("{prompt}", problem.text)
        if not self._apply_chat_template:
            return self._tokenizer.encode_prompt(text)
        turns = problem.messages or ({"role": "user", "content": text},)
        return self._tokenizer.encode_chat(turns)

    def _skip_long(self, index: int, length: int) -> None:
        if not self.skipped["too_long"]:
            logger.warning(
                "%s: problem %d has %d tokens, more than rollout.max_prompt_length = %d; it is "
                "skipped, and so are others like it",
                self._where,
                index,
                length,
                self._max_prompt_length,
            )
        self.skipped["too_long"] += 1


def held_out(
    data: DataConfig,
    tokenizer: Tokenizer,
    n: int,
    *,
    max_prompt_length: int,
    unverifiable: Unverifiable | None = None,
) -> list[Prompt]:
    """``n`` evaluation problems with different texts; fewer, with a warning, if there are fewer.

    They come from ``data.eval``, or, where that is None, from ``data.train`` under a seed that
    training cannot have. Give their texts to the training source's ``exclude``. Raises UserError as
    ``PromptSource`` does.
    """
    where = "data.eval" if data.eval else "data.train (for evaluation)"
    source = data.eval or dataclasses.replace(data.train, seed=-1 - data.train.seed)
    found: dict[str, Prompt] = {}
    prompts = PromptSource(
        dataclasses.replace(data, train=source),
        tokenizer,
        max_prompt_length=max_prompt_length,
        where=where,
        unverifiable=unverifiable,
    )
    while len(found) < n:
        try:
            (prompt,) = prompts.next(1)
        except UserError:
            if not found:
                raise
            logger.warning("%s: expected %d different problems, got %d", where, n, len(found))
            break
        found[prompt.text] = prompt
        prompts.exclude([prompt.text])
    return list(found.values())


class _Tasks:
    """A weighted mixture of reasoning-gym tasks."""

    patience = PATIENCE

    def __init__(
        self, data: DataConfig, where: str, unverifiable: Unverifiable | None = None
    ) -> None:
        source = data.train
        self._source = source
        self._datasets: dict[int, tuple[int, Any]] = {}
        self._failed: set[str] = set()
        for i, task in enumerate(source.tasks):
            _check_task(task, f"{where}.tasks.{i}")
            try:
                first = _answer_of(self._item(i, 0))
            except Exception as error:  # whatever the task's own validation raises
                raise UserError(
                    f"{where}.tasks.{i}.options: {task.name} refuses {task.options}: "
                    f"{one_line(error)}; change them"
                ) from None
            if unverifiable and (reason := unverifiable(first)):
                raise UserError(
                    f"{where}.tasks.{i}: expected answers to compare responses with, got one of "
                    f"{task.name} that is {reason}; set reward.function=reasoning_gym"
                )

    def get(self, index: int) -> Problem | None:
        tasks = self._source.tasks
        rng = random.Random(f"{self._source.seed}/{index}")
        (i,) = rng.choices(range(len(tasks)), [task.weight for task in tasks])
        name = tasks[i].name
        try:
            item = self._item(i, index)
        except Exception as error:  # some tasks cannot make some of their items
            if name not in self._failed:
                logger.warning("%s made no item %d: %s", name, index, one_line(error))
                self._failed.add(name)
            return None
        entry = {**item, "options": tasks[i].options}
        return Problem(item["question"], _answer_of(item), name, entry, at=f"{name} {index}")

    def kinds(self) -> list[Problem]:
        return []

    @property
    def digest(self) -> str:
        return repr((self._source.seed, self._source.tasks))

    def _item(self, i: int, index: int) -> dict[str, Any]:
        import reasoning_gym  # seconds to import

        chunk, offset = divmod(index, CHUNK)
        seed = f"{self._source.seed}/{i}/{chunk}"
        if i not in self._datasets or self._datasets[i][0] != chunk:
            with _global_seed(seed):
                dataset = reasoning_gym.create_dataset(
                    self._source.tasks[i].name,
                    seed=random.Random(seed).getrandbits(31),
                    size=CHUNK,
                    **self._source.tasks[i].options,
                )
            self._datasets[i] = chunk, dataset
        with _global_seed(f"{seed}/{offset}"):
            return self._datasets[i][1][offset]


class _Rows:
    """The problems of a dataset, shuffled anew in each epoch."""

    def __init__(
        self, data: DataConfig, where: str, unverifiable: Unverifiable | None = None
    ) -> None:
        self._rows = read_problems(data, where, unverifiable)
        self._seed = data.train.seed
        self._epoch = -1
        self._order: list[int] = []
        self.patience = 2 * len(self._rows)  # holds a whole epoch, wherever it starts

    def get(self, index: int) -> Problem:
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._rows)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._rows[self._order[place]]

    def kinds(self) -> list[Problem]:
        """A problem of each sequence of roles: chat templates refuse some."""
        found: dict[tuple[str, ...], Problem] = {}
        for row in self._rows:
            found.setdefault(tuple(turn["role"] for turn in row.messages), row)
        return list(found.values())

    @functools.cached_property  # asked at each checkpoint
    def digest(self) -> str:
        content = hashlib.sha256(str(self._seed).encode())
        for problem in self._rows:
            content.update(repr((problem.messages, problem.text, problem.answer)).encode())
        return content.hexdigest()


def _answer_of(item: dict[str, Any]) -> str:
    return "" if item["answer"] is None else str(item["answer"])


def _check_task(task: TaskConfig, where: str) -> None:
    """Raises UserError for a name or an option that reasoning-gym does not have."""
    from reasoning_gym.factory import DATASETS  # seconds to import

    tasks = sorted(set(DATASETS) - {"composite"})  # a mixture is written as several tasks
    if task.name not in tasks:
        raise UserError(
            f"{where}.name: expected a reasoning-gym task, got {task.name!r}"
            f"{hint(task.name, tasks)}"
        )
    fields = {f.name for f in dataclasses.fields(DATASETS[task.name][1])}
    options = sorted(fields - {"seed", "size"})  # these are the source's
    for option in task.options:
        if option not in options:
            raise UserError(
                f"{where}.options: {task.name} has no option {option!r}; it takes "
                f"{', '.join(options) or 'none'}{hint(option, options)}"
            )
    if task.name in HASH_ORDERED_TASKS and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UserError(
            f"{where}.name: {task.name} makes other problems in every process, unless Python's "
            f"hash seed is fixed; start with PYTHONHASHSEED=0 in the environment"
        )


@contextlib.contextmanager
def _global_seed(seed: str) -> Iterator[None]:
    """Seed the global generators, which some tasks draw from, and put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
