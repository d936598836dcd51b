"""Several vLLM servers as one engine.

Everything that servers are asked is asked by one thread, in one loop of asyncio (:mod:`.fleet`).
"""

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.metrics import Metrics
from sapo_megatron.recipe.schema import RolloutConfig
from sapo_megatron.rollout.engine import Arrived, Request, SamplingParams
from sapo_megatron.rollout.vllm.answers import ROUTES_FLAG
from sapo_megatron.rollout.vllm.fleet import Fleet, Probe, Weights
from sapo_megatron.rollout.vllm.work import Batch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class VllmEngine:
    """Samples from vLLM servers; ``check`` them, ``load`` weights, ``begin``, and ``close``.

    All methods but ``begin`` wait for what they say. They raise RunFailed where too few servers are
    left to do the work, or one answers nonsense.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        arch: Architecture,
        *,
        with_routes: bool = False,
        exited: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        """``with_routes``: samples must carry the experts that were chosen (router_replay R3).

        ``exited`` says of a URL whether its server will not come back, and why.
        """
        assert config.min_servers <= len(urls), "refused before servers start"
        self._fleet = Fleet(urls, config, arch, exited)
        self._fleet.with_routes = with_routes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give up on what is under way; the engine cannot be used afterwards."""
        self._run(self._fleet.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def check(self) -> None:
        """Wait for every server, and see that all serve this model as we need it.

        Raises UserError that names the server and what is wrong with it.
        """
        self._run(self._fleet.check())

    @property
    def returns_routes(self) -> bool:
        """Whether all of these servers return the experts; after ``check``."""
        return not self._fleet.without_routes

    def take_routes(self, *, everywhere: bool) -> None:
        """From here on samples carry the experts, if all servers of the run return them."""
        self._fleet.with_routes = everywhere
        for url in sorted(self._fleet.without_routes):
            logger.info(
                "%s returns no routes, so rollout_train/variance is left out; %s would have it",
                url,
                ROUTES_FLAG,
            )

    def load(self, folder: Path, probe: Probe, version: int) -> dict[str, float]:
        """Put the weights of a Hugging Face folder into all servers, and verify them.

        Each server takes them when it is in the middle of no response: it finishes those it has
        begun or, with ``on_new_weights: continue``, goes on with them under the new weights. The
        folder must be there until the next load: a server that is away gets them when it is back.

        ``version`` is what samples tell of these weights. Returns the mean absolute difference of
        the probe's log-probs, by URL of the servers that have the weights. Raises RunFailed where
        it is above the probe's tolerance.
        """
        return self._load(folder, probe, version, uuid.uuid4().hex)

    def receive(self, send: Callable[[], None], probe: Probe, version: int) -> dict[str, float]:
        """Verify the weights that ``send`` puts into all servers; as ``load`` otherwise.

        Raises RunFailed also where a server is away. One that is restarted later is without the
        weights, and gets no work.
        """
        label = uuid.uuid4().hex
        self._run(self._fleet.rest())
        self._run(self._fleet.label(f"part of {label}"))
        send()
        self._run(self._fleet.label(label))
        return self._load(None, probe, version, label)

    def _load(
        self, folder: Path | None, probe: Probe, version: int, label: str
    ) -> dict[str, float]:
        weights = Weights(folder=folder, probe=probe, version=version, label=label)
        return self._run(self._fleet.load(weights))

    def begin(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        arrived: Arrived,
        *,
        first: bool = False,
    ) -> Future[Metrics]:
        """Have ``arrived`` called with a response to every request, in the order they come.

        ``first``: before those that were asked for earlier and have not begun. What is returned
        holds, once all are there, what happened, or the error that ended it.

        Each request has a seed of its own, made of ``params.seed`` and its uid. A server's numbers
        depend in their last digits on what else it works on, so that now and then the same seed
        gives another response.
        """
        batch = Batch(requests, params, arrived)
        self._run(self._fleet.begin(batch, first=first))
        return batch.done

    def sleep(self) -> None:
        """Have all servers drop their weights and free their memory, until the next ``load``.

        Raises RunFailed where one may not have done so. It has not been run on a GPU.
        """
        self._run(self._fleet.sleep())

    def spent(self, name: str) -> Metrics:
        """As :meth:`sapo_megatron.rollout.engine.Engine.spent`."""
        return self._run(self._fleet.spent(name))

    def _run(self, what: Coroutine[Any, Any, Result]) -> Result:
        """What a coroutine returns, in the loop."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()
