"""A training step, from a minibatch to moved weights, and the same as one CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agcseg.config import Config
from agcseg.errors import UserError, first_line
from agcseg.training import parallel
from agcseg.training.machine import out_of_memory
from agcseg.training.passes import backward
from agcseg.training.state import State

EAGER = 3  # steps before a capture: momentum, workspaces, compiled kernels and cuDNN's choices are there then


def make_step(config: Config, state: State, model: nn.Module, weights: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The function that trains on one minibatch, of images, labels and, where the network finds them, contours.

    Args:
        model: the network as it is called in training.
        weights: of the classes, (classes,).

    Returns:
        a function that returns the mean losses, see `agcseg.training.passes.backward`, and the gradient's norm, ().
    """
    step = partial(_step, config, state, model, weights)
    return graphed(step, state.optimizer) if config.graph else step


def _step(config, state: State, model, weights, images, labels, contours=None) -> tuple[Tensor, Tensor]:
    network, gems = state.network, state.gems
    state.optimizer.zero_grad()
    losses = backward(model, images, labels, weights, config, contours)
    if gems:
        for counts in (*gems.active.values(), *gems.points.values()):
            parallel.add(counts)
        gems.scale_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    if config.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), config.clip_norm, norm)
    state.optimizer.step()
    return losses, norm


def graphed(step: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """A step as one CUDA graph: the host asks once for what are hundreds of kernels, which a small minibatch does not
    keep busy for as long as asking for them takes.

    The first EAGER calls run as they are; the next one captures. A graph has the optimiser's rate in it as a number, so
    that another rate means another capture, which takes about as long as an eager step.

    Args:
        step: takes tensors, always of the same shapes, and returns tensors. What it reads and writes besides must stay
            where it is in memory.

    Returns:
        the same function, whose results are overwritten by its next call.

    Raises:
        UserError: (the function) the step cannot be captured.
    """
    calls, replay, rates, outputs = 0, None, None, None
    inputs: list[Tensor] = []

    def run(*minibatch: Tensor) -> Any:
        nonlocal calls, replay, rates, outputs
        calls += 1
        if calls <= EAGER:
            return step(*minibatch)
        inputs[:] = inputs or map(torch.empty_like, minibatch)
        for static, part in zip(inputs, minibatch, strict=True):
            static.copy_(part)
        now = [group["lr"] for group in optimizer.param_groups]
        if now != rates:
            replay = outputs = None  # its memory serves the next
            optimizer.zero_grad()
            rates = now
            replay, outputs = capture(partial(step, *inputs), optimizer)
        replay()
        return outputs

    return run


def capture(call: Callable[[], Any], optimizer) -> tuple[Callable[[], None], Any]:
    """What does on the device what `call` would, and where the results then are. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    adam = [group for group in optimizer.param_groups if "capturable" in group]
    for group in adam:  # torch asks for the word; fused, Adam counts its steps on the device in any case
        group["capturable"] = True
    try:
        # Other threads, which read ahead and write, may go on with what a capture forbids.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            outputs = call()
    except RuntimeError as error:
        first = error.__context__ or error  # the end of a broken capture raises too
        if out_of_memory(first):
            raise first from None
        raise UserError(
            f"graph=true: a step of this network cannot be captured ({first_line(first)}); use graph=false"
        ) from None
    finally:
        for group in adam:
            group["capturable"] = False
    return graph.replay, outputs
