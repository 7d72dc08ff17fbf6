"""Run the rest of a network from where a layer begins.

A search asks hundreds of times what a network answers when one layer has changed. Everything that runs before this
layer gives the same activations each time, so they are computed once and kept. `Replay` assumes nothing about the
network's shape. It watches one forward pass, finds the submodules that have returned before the layer is called or its
weight read, and lets these, when the network is run again, return what they returned before instead of computing it. Of
these results only those that some later computation reads are kept; the others become tensors without data.
"""

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from urank.distributed import processes
from urank.memory import free_memory

LEAST_MEMORY = 2 << 30  # bytes of activations that a replay may keep on any processor

# What submodules returned in one forward pass, call by call; modules inside a module that returned are left out.
Results = dict[nn.Module, list]
# What a module may return beside tensors, in tuples, lists and dictionaries.
UNCHANGING = NoneType | bool | int | float | str | torch.dtype | torch.device | torch.Size


class Replay:
    """The logits of `model` over `batches`, computed from one layer on.

    Use it in evaluation mode without gradients (`layers.evaluating`). After `advance(layer)` weights may change in
    that layer and in what runs after it, nowhere before.

    Args:
        model: maps a batch of images to logits (n, classes).
        batches: a re-iterable of (images, labels), the same each time.
        memory: bytes of activations that may be kept; batches that find no room are run whole. Default a third of the
            memory that is free, shared among the processes, at least 2 GiB; on a GPU half of its own.

    Attributes:
        exact: False once replaying the first batch did not reproduce the network's logits bit for bit (its forward
            pass is random, say). A warning says so, and every batch is then run whole.
    """

    def __init__(self, model: nn.Module, batches: Iterable, memory: int | None = None):
        self.model, self.batches = model, batches
        self.memory = room_on(model) if memory is None else memory
        self.exact = True
        self._pass: Timeline | None = None
        self._kept: list[Results] = []
        self._by_image = True  # every tensor that is kept has one row an image
        self._finished: set[nn.Module] = set()
        self._changed: set[nn.Module] = set()
        self._sorted = False  # what is kept is then parts of one tensor, which is freed as a whole

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, labels) of every batch."""
        return self.since(0)

    def since(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, labels) of every batch but the `first`, which are not run."""
        for index, (images, labels) in islice(enumerate(self.batches), first, None):
            with returning(self._before(index), self._changed):
                logits = self.model(images)
            yield logits, labels

    def chosen(self, marks: Tensor, first: int, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, labels) of the images where `marks` (images,) is true, which begin with the batch `first`.

        They are gathered from their batches into larger ones, of `together` images or somewhat more.
        """
        for kept, images, labels in self._gathered(marks, first, together):
            with returning(kept):  # copies already
                logits = self.model(images)
            yield logits, labels

    def _gathered(self, marks: Tensor, first: int, together: int) -> Iterator[tuple[Results, Tensor, Tensor]]:
        waiting, count, replays, seen = [], 0, False, 0
        for index, (images, labels) in islice(enumerate(self.batches), first, None):
            rows = marks[seen : seen + len(labels)].nonzero()[:, 0].to(images.device)
            seen += len(labels)
            if len(rows):
                kept = rows_of(self._before(index), rows) if self._by_image else {}
                # what is replayed and what is run whole cannot share a batch
                if waiting and (count >= together or replays != bool(kept)):
                    yield joined(waiting)
                    waiting, count = [], 0
                waiting.append((kept, images[rows], labels[rows]))
                count, replays = count + len(rows), bool(kept)
            if seen >= len(marks):
                break
        if waiting:
            yield joined(waiting)

    def advance(self, layer: nn.Module) -> None:
        """Keep what `layer` and everything after it read, as it is with the weights of this moment."""
        images, _ = next(iter(self.batches))
        if self._pass is None:
            self._pass = timeline(self.model, images)
        weights, layer = list(layer.parameters()), caller(self.model, layer, self._pass.calls)
        cut = _Cut(self.model, layer, finished_before(self._pass, layer, weights))
        if not self._finished <= cut.finished:  # a step back: what was kept skips over the layer
            self._kept = []
        self._finished = cut.finished
        if self.exact and (obstacle := cut.obstacle(images)) is not None:
            name = type(self.model).__name__
            warnings.warn(f"{name} is not reproduced by a replay ({obstacle}): every probe runs it whole", stacklevel=3)
            self.exact = False
        self._kept, self._changed = self._fill(cut) if self.exact else [], cut.changed
        self._by_image = self._by_image and self._turns()  # a tensor may have as many rows as there are images
        self._sorted = False

    def reorder(self, batches: Iterable, order: Tensor, sizes: Sequence[int]) -> None:
        """Go on with `batches`: the same images in the order of the indices `order` (n,), in batches of the same sizes.

        What is kept is put in this order where that is possible: there are rows of every image, and room for copies.
        """
        self.batches = batches
        whole = len(self._kept) == len(sizes) and 2 * size_of(self._kept) <= self.memory
        self._kept = reordered(self._kept, order, sizes) if whole and self._by_image else []
        self._sorted = True

    def _before(self, index: int) -> Results:
        return self._kept[index] if index < len(self._kept) else {}

    def _fill(self, cut: "_Cut") -> list[Results]:
        kept, old, self._by_image = [], self._kept, True
        room = self.memory - size_of(old) if self._sorted else self.memory
        sizes = [0 if self._sorted else size_of([results]) for results in old]
        for index, (images, _) in enumerate(self.batches):
            with returning(self._before(index), self._changed):
                results = cut.record(images)
            if index < len(old):
                old[index], sizes[index] = {}, 0  # superseded
            room -= size_of([results])
            while len(old) > index + 1 and sum(sizes) > room:
                del old[-1], sizes[-1]  # the last batches make room: they are run whole
            if room < 0:
                break
            kept.append(results)
            self._by_image &= has_rows(results, len(images))
        return kept

    def _turns(self) -> bool:
        """Whether what is kept of a batch, its rows in reverse order, makes its logits in reverse order."""
        for (images, _), kept in zip(self.batches, self._kept):
            if len(images) > 1:
                back = torch.arange(len(images) - 1, -1, -1, device=images.device)
                with returning(kept, self._changed):
                    logits = self.model(images)
                with returning(rows_of(kept, back)):
                    turned = self.model(images[back])
                return torch.allclose(turned[back], logits, rtol=0, atol=1e-3 * logits.abs().max().item())
        return True


class _Cut:
    """The place where one layer begins: which submodules have returned by then, and which results are read later."""

    def __init__(self, model: nn.Module, layer: nn.Module, finished: set[nn.Module]):
        self.model, self.layer, self.finished = model, layer, finished
        self.read: set[tuple[nn.Module, int, int]] | None = None  # (module, call, tensor of that call); None: all
        self.changed: set[nn.Module] = set()  # what they returned is changed in place by what runs later

    def record(self, images: Tensor) -> Results:
        """Run the network up to the layer; copies of what is read later, data-less tensors for the rest."""
        results: Results = {}
        depth = 0

        def enter(*_) -> None:
            nonlocal depth
            depth += 1

        def leave(module: nn.Module, _, output) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:  # not inside another finished module
                calls = results.setdefault(module, [])
                calls.append(self._slim(module, len(calls), output))

        handles = [module.register_forward_pre_hook(enter) for module in self.finished]
        handles += [module.register_forward_hook(leave) for module in self.finished]
        handles.append(self.layer.register_forward_pre_hook(_stop))
        try:
            self.model(images)
        except _Reached:
            return results
        finally:
            for handle in handles:
                handle.remove()
        raise ValueError("the forward pass does not reach the layer it reached before")

    def _slim(self, module: nn.Module, call: int, output):
        leaves, structure = tree_flatten(output)
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor | UNCHANGING):
                raise _Unrecorded(f"{type(module).__name__} returns a {type(leaf).__name__}, which may change later")
            if isinstance(leaf, Tensor):
                needed = self.read is None or (module, call, position) in self.read
                # A copy, because the network may go on to change its own tensor in place.
                leaves[position] = leaf.clone() if needed else torch.empty_like(leaf, device="meta")
        return structure.unflatten(leaves)

    def obstacle(self, images: Tensor) -> str | None:
        """Find out which results are read, and why a replay that keeps only those gives other logits; None if not."""
        expected = self.model(images)
        try:
            results = self.record(images)
            with _Reads(results) as reads, returning(results):
                self.model(images)
            self.read, self.changed = reads.seen, {module for module, calls in results.items() if is_changed(calls)}
            results = self.record(images)
            # Whatever modules hand each other out of sight is now that of other images, and of more of them.
            self.model(torch.zeros_like(torch.cat([images, images])))
            for _ in range(2):  # the second time with what the first has left
                with returning(results, self.changed):
                    if not torch.equal(self.model(images), expected):
                        return "other logits"
            return None
        except _Unrecorded as reason:
            return str(reason)
        except Exception as error:  # a forward without its submodules' may raise anything; whole it has just run
            return f"{type(error).__name__}: {error}"


class _Reached(Exception):
    """The forward pass has come to the layer that it was run for."""


def _stop(*_) -> None:
    raise _Reached


class _Unrecorded(Exception):
    """What a module returned cannot be kept."""


class _Reads(TorchFunctionMode):
    """Which tensors of `results` the torch functions inside the block are called with."""

    def __init__(self, results: Results):
        super().__init__()
        self.seen: set[tuple[nn.Module, int, int]] = set()
        self._place = {
            id(leaf): (module, call, position)
            for module, calls in results.items()
            for call, output in enumerate(calls)
            for position, leaf in enumerate(tree_flatten(output)[0])
            if isinstance(leaf, Tensor)
        }
        self._alive = results  # an id is only a name while its tensor lives

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for leaf in tree_flatten((args, kwargs))[0]:
            if id(leaf) in self._place:
                self.seen.add(self._place[id(leaf)])
        return func(*args, **(kwargs or {}))


def room_on(model: nn.Module) -> int:
    """How many bytes of activations a replay may keep on the device of `model` where nobody says."""
    gpu = next((parameter.device for parameter in model.parameters() if parameter.is_cuda), None)
    if gpu is None:
        return max(LEAST_MEMORY, free_memory() // 3 // processes()[1])
    kept_by_torch = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)  # free for it alone
    return (torch.cuda.mem_get_info(gpu)[0] + kept_by_torch) // 2


def is_data(leaf) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta


def is_changed(calls: list) -> bool:
    """Whether a tensor in `calls`, new when it was put there, has been changed in place; True where nobody counts."""
    leaves = [leaf for leaf in tree_flatten(calls)[0] if isinstance(leaf, Tensor)]
    return any(leaf.is_inference() or leaf._version > 0 for leaf in leaves)


def size_of(kept: list[Results]) -> int:
    """Bytes of the activations in `kept`."""
    return sum(leaf.nbytes for results in kept for leaf in tree_flatten(list(results.values()))[0] if is_data(leaf))


def has_rows(results: Results, images: int) -> bool:
    """Whether every tensor in `results` has one row an image."""
    return all(leaf.shape[:1] == (images,) for leaf in tree_flatten(results)[0] if is_data(leaf))


def reordered(kept: list[Results], order: Tensor, sizes: Sequence[int]) -> list[Results]:
    """`kept`, one row an image in every tensor, with the rows of all batches in another order."""
    flat = [tree_flatten(results) for results in kept]
    columns = [list(column) for column in zip(*(leaves for leaves, _ in flat))]
    for column in columns:
        if is_data(column[0]):
            column[:] = in_order(column, order).split(sizes)
    return [structure.unflatten(leaves) for leaves, (_, structure) in zip(zip(*columns), flat)]


def rows_of(results: Results, rows: Tensor) -> Results:
    """Those of some images of a batch; none where a module returned a number, which may be how many they are."""
    leaves, structure = tree_flatten(results)
    if any(isinstance(leaf, int | float | torch.Size) and not isinstance(leaf, bool) for leaf in leaves):
        return {}
    return structure.unflatten([leaf[rows.to(leaf.device)] if is_data(leaf) else leaf for leaf in leaves])


def joined(parts: Sequence[tuple[Results, Tensor, Tensor]]) -> tuple[Results, Tensor, Tensor]:
    """Results, images and labels of several batches as those of one."""
    flat, structure = zip(*(tree_flatten(part) for part in parts))
    leaves = [torch.cat(column) if is_data(column[0]) else column[0] for column in zip(*flat, strict=True)]
    return structure[0].unflatten(leaves)


def in_order(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """`torch.cat(parts)[order]` in a single copy: rows in the order of the indices `order` (n,), none of them twice."""
    first, sizes = parts[0], [len(part) for part in parts]
    place = order.new_full((sum(sizes),), -1)
    place[order] = torch.arange(len(order), device=order.device)
    rows = first.new_empty((len(order), *first.shape[1:]))
    if not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
        rows = torch.empty_like(rows, memory_format=torch.channels_last)
    for part, places in zip(parts, place.to(first.device).split(sizes)):
        taken = places >= 0
        rows[places[taken]] = part[taken]
    return rows


@contextmanager
def returning(results: Results, changed: Container[nn.Module] = ()) -> Iterator[None]:
    """Inside the block the modules in `results` return the next of their results instead of computing it.

    Those in `changed` return copies, as the network changes in place what it is given.
    """
    replaced = {module: module.__dict__.get("forward") for module in results}
    for module, outputs in results.items():
        module.forward = _next_of(outputs, module in changed)
    try:
        yield
    finally:
        for module, forward in replaced.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _next_of(outputs: list, copies: bool):
    remaining = iter(outputs)

    def forward(*_, **__):
        try:
            output = next(remaining)
        except StopIteration:
            raise _Unrecorded("a forward is called otherwise than by calling its module") from None
        return tree_map(lambda leaf: leaf.clone() if is_data(leaf) else leaf, output) if copies else output

    return forward


class Timeline(NamedTuple):
    """One forward pass, counted in calls and returns of modules.

    Attributes:
        calls: when each submodule's calls begin and end.
        reads: when each parameter is first given to a torch function.
    """

    calls: dict[nn.Module, list[tuple[int, int]]]
    reads: dict[nn.Parameter, int]


class _FirstReads(TorchFunctionMode):
    def __init__(self, now: Callable[[], int]):
        super().__init__()
        self.now, self.seen = now, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) or getattr(func, "__name__", "") != "__get__":  # else a dtype or a shape
            for leaf in tree_flatten((args, kwargs))[0]:
                if isinstance(leaf, nn.Parameter):
                    self.seen.setdefault(leaf, self.now())
        return result


def timeline(model: nn.Module, images: Tensor) -> Timeline:
    """Run `model` once and note when what is called and read."""
    calls: dict[nn.Module, list[tuple[int, int]]] = {}
    starts: dict[nn.Module, list[int]] = {}
    clock = 0

    def enter(module: nn.Module, _) -> None:
        nonlocal clock
        starts.setdefault(module, []).append(clock)
        clock += 1

    def leave(module: nn.Module, *_) -> None:
        nonlocal clock
        calls.setdefault(module, []).append((starts[module].pop(), clock))
        clock += 1

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with _FirstReads(lambda: clock) as reads:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return Timeline(calls, reads.seen)


def caller(model: nn.Module, layer: nn.Module, called: Container[nn.Module]) -> nn.Module:
    """`layer`, or the innermost module around it that is called: one that reads the layer's weight, then."""
    path = next(path for path, module in model.named_modules() if module is layer)
    while layer not in called and path:
        path = path.rpartition(".")[0]
        layer = model.get_submodule(path)
    return layer


def finished_before(seen: Timeline, layer: nn.Module, weights: Iterable[nn.Parameter]) -> set[nn.Module]:
    """The modules whose every call has returned when `layer` is first called, or one of its `weights` read before."""
    begin = min([start for start, _ in seen.calls[layer]] + [seen.reads[one] for one in weights if one in seen.reads])
    return {module for module, calls in seen.calls.items() if all(end < begin for _, end in calls)}
