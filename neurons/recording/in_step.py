"""Passes that run in step: each module runs in all passes before the next module runs in any.

A pass is a function that runs the model, in a thread of its own.  It pauses where the model calls a decoder layer or
another module with weights.  The caller's thread then runs that module for every pass, in order, and its offloaded
weights are read once for all of them.  What the model computes between its modules (masks, positions, what layers
share) stays in the paused calls, so every architecture computes exactly what it computes in one pass after another.
One thread runs at a time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from neurons.architectures.anatomy import Anatomy, first
from neurons.architectures.offload import held
from neurons.recording.waiting_states import WaitingStates, addresses


@dataclass(frozen=True)
class _Call:
    """The call of a module at which a pass is paused."""

    module: nn.Module
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


class PassesInStep(AbstractContextManager["PassesInStep"]):
    """Passes that pause at modules; the context ends those that have not run to their end.

    Args:
        model: causal language model.
        passes: functions that run the model, without gradients.
        on_disk: whether the hidden states of paused passes are in temporary files.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        passes: Sequence[Callable[[], object]],
        on_disk: bool = False,
    ) -> None:
        fixed = addresses(model)
        self._passes = [_Pass(run, WaitingStates(fixed) if on_disk else None) for run in passes]
        self._layers = {id(layer): number for number, layer in enumerate(anatomy.blocks)}
        self._undo = ExitStack()
        for module in _pausing(model, anatomy):
            self._undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            # nn.Module.__call__ calls this before any hook of the module.
            module._compiled_call_impl = partial(_call, module)

    def __exit__(self, *_: object) -> None:
        for paused in self._passes:
            paused.end()
        self._undo.close()

    def run(
        self,
        stop: int | None = None,
        before: Callable[[int], object] | None = None,
        after_layer: Callable[[int, int], object] | None = None,
    ) -> None:
        """Run all passes until they call the layer ``stop``; None runs them to their end.

        Args:
            before: called with the number of a pass before a part of it runs.
            after_layer: called with the number of a pass and the layer that it has run.

        Raises:
            Exception: whatever a pass raises.
        """

        def resume(number: int, answer: Any = None) -> None:
            if before is not None:
                before(number)
            self._passes[number].resume(answer)

        for number, paused in enumerate(self._passes):
            if not paused.started:
                resume(number)
        while True:
            call = next((paused.call for paused in self._passes if paused.call is not None), None)
            if call is None or (stop is not None and self._layers.get(id(call.module)) == stop):
                return
            module = call.module
            del call  # otherwise this frame keeps its hidden states
            with held(module):
                for number, paused in enumerate(self._passes):
                    if paused.call is None or paused.call.module is not module:
                        continue
                    if before is not None:
                        before(number)
                    resume(number, paused.run_module())
                    layer = self._layers.get(id(module))
                    if after_layer is not None and layer is not None:
                        after_layer(number, layer)


def _pausing(model: nn.Module, anatomy: Anatomy) -> Iterator[nn.Module]:
    """The decoder layers, and the largest other modules that have weights and contain no layer."""
    layers = {id(layer) for layer in anatomy.blocks}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        inside = {id(part) for part in module.modules()}
        if id(module) in layers:
            yield module
        elif inside & layers:
            for child in module.children():
                yield from walk(child)
        elif next(module.parameters(), None) is not None:
            yield module

    yield from walk(model)


class _EndError(BaseException):
    """Unwinds the thread of a pass; no ``except Exception`` of a model stops it."""


class _Pass:
    """A function in a thread of its own, which runs only within ``resume``."""

    def __init__(self, run: Callable[[], object], waiting: WaitingStates | None) -> None:
        self.call: _Call | None = None
        self.started = False
        self._run, self._waiting = run, waiting
        self._outputs: list[weakref.ref[torch.Tensor]] = []  # of modules: some stay until the end of the pass
        self._answer: Any = None
        self._error: BaseException | None = None
        self._ended = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)

    def run_module(self) -> Any:
        """The result of the call at which the pass is paused."""
        assert self.call is not None
        call = self.call
        if self._waiting is not None:
            self._waiting.restore()
        with torch.no_grad():
            output = call.module._call_impl(*call.arguments, **call.named)
        if self._waiting is not None and isinstance(first(output), torch.Tensor):
            self._outputs.append(weakref.ref(first(output)))
        return output

    def resume(self, answer: Any) -> None:
        """Run until the next call of a pausing module, or to the end.

        Args:
            answer: the result of the call at which the pass is paused.

        Raises:
            Exception: whatever the function raises.
        """
        self.call, self._answer = None, answer
        if self.started:
            self._go.release()
        else:
            self.started = True
            self._thread.start()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        if self._waiting is not None and self.call is not None:
            del answer
            self._outputs = [output for output in self._outputs if output() is not None]
            kept = [output() for output in self._outputs]
            self._waiting.move(value for value in [_hidden(self.call), *kept] if value is not None)

    def end(self) -> None:
        """End the thread, wherever the function is paused."""
        self._ended = True
        if self.started:
            self._go.release()
            self._thread.join()
        if self._waiting is not None:
            self._waiting.close()

    def pause(self, call: _Call) -> Any:
        """The result of a call; called in the thread of the pass."""
        self.call = call
        del call
        self._paused.release()
        self._go.acquire()
        if self._ended:
            raise _EndError
        answer, self._answer = self._answer, None
        return answer

    def _main(self) -> None:
        _running.own = self
        try:
            # Sets the thread's number of threads, which is then limited: each thread would have a pool of its own.
            torch.get_num_threads()
            with torch.no_grad(), _pools().limit(limits=1, user_api="openmp"):
                self._run()
        except _EndError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._paused.release()


def _hidden(call: _Call) -> torch.Tensor | None:
    """The hidden states that a module is called with."""
    value = call.arguments[0] if call.arguments else call.named.get("hidden_states")
    return value if isinstance(value, torch.Tensor) else None


_running = threading.local()


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def _call(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    own: _Pass | None = getattr(_running, "own", None)
    if own is None:
        return module._call_impl(*arguments, **named)
    return own.pause(_Call(module, arguments, named))
