"""Run a network from one layer on, with the earlier activations kept.

A search runs the network hundreds of times with one layer changed. Everything before this layer gives the same
activations each time, so they are computed once and kept. `Replay` makes no assumption about the architecture. It
watches one forward pass and finds the submodules that return before the layer is called or its weight is read. When
the network is run again, these submodules return their kept outputs instead of computing them. Only outputs that later
computations read are kept; the others are replaced by tensors without data (on the meta device).
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

MIN_CPU_MEMORY = 2 << 30  # bytes of activations that a replay may keep on any CPU

# The outputs of submodules in one forward pass, one per call. Modules inside a module that is listed are left out.
Results = dict[nn.Module, list]
# What a module may return besides tensors, in tuples, lists and dictionaries.
IMMUTABLE = NoneType | bool | int | float | str | torch.dtype | torch.device | torch.Size


class Replay:
    """Compute the logits of `model` over `batches`, starting from one layer.

    Use it in evaluation mode without gradients (`layers.evaluating`). After `advance(layer)`, only weights of that
    layer and of later ones may change.

    Args:
        model: maps a batch of images to logits (n, classes).
        batches: batches of (images, labels) that can be iterated repeatedly.
        memory: bytes of activations to keep. Batches that do not fit are run through the whole network. Default: on a
            CPU a third of the free memory, divided among the processes, at least 2 GiB; on a GPU half of its free
            memory.

    Attributes:
        exact: False if a replay of the first batch did not reproduce the network's logits bit for bit, for example
            because its forward pass is random. Then a warning is issued and every batch is run through the whole
            network.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
        >>> batches = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
        >>> replay = Replay(model, batches)
        >>> with torch.no_grad():
        ...     replay.advance(model[2])  # the first two modules are not run again
        ...     [(logits, labels)] = replay
        >>> logits.shape
        torch.Size([5, 2])
    """

    def __init__(self, model: nn.Module, batches: Iterable, memory: int | None = None):
        self.model, self.batches = model, batches
        self.memory = room_on(model) if memory is None else memory
        self.exact = True
        self._pass: Timeline | None = None
        self._kept: list[Results] = []
        self._by_image = True  # every kept tensor has one row per image
        self._finished: set[nn.Module] = set()
        self._changed: set[nn.Module] = set()
        self._sorted = False  # True: kept tensors are views of one tensor, which is only freed as a whole

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits, labels) of every batch."""
        return self.since(0)

    def since(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits, labels) of every batch from number `first` on."""
        for index, (images, labels) in islice(enumerate(self.batches), first, None):
            with returning(self._before(index), self._changed):
                logits = self.model(images)
            yield logits, labels

    def chosen(self, marks: Tensor, first: int, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits, labels) of the images where `marks` (images,) is True.

        Args:
            marks: one value per image, from the images of batch number `first` on.
            first: number of the first batch.
            together: images per batch, or slightly more, when the selected images are gathered.
        """
        for kept, images, labels in self._gathered(marks, first, together):
            with returning(kept):  # `kept` consists of copies
                logits = self.model(images)
            yield logits, labels

    def _gathered(self, marks: Tensor, first: int, together: int) -> Iterator[tuple[Results, Tensor, Tensor]]:
        waiting, count, replays, seen = [], 0, False, 0
        for index, (images, labels) in islice(enumerate(self.batches), first, None):
            rows = marks[seen : seen + len(labels)].nonzero()[:, 0].to(images.device)
            seen += len(labels)
            if len(rows):
                kept = rows_of(self._before(index), rows) if self._by_image else {}
                # A batch is either replayed or run through the whole network.
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
        """Keep the activations that `layer` and everything after it read, with the current weights."""
        images, _ = next(iter(self.batches))
        if self._pass is None:
            self._pass = timeline(self.model, images)
        weights, layer = list(layer.parameters()), caller(self.model, layer, self._pass.calls)
        cut = _Cut(self.model, layer, finished_before(self._pass, layer, weights))
        if not self._finished <= cut.finished:  # a step back: the kept activations skip the layer
            self._kept = []
        self._finished = cut.finished
        if self.exact and (obstacle := cut.obstacle(images)) is not None:
            name = type(self.model).__name__
            warnings.warn(
                f"replaying {name} does not reproduce its logits ({obstacle}); every probe runs the whole network",
                stacklevel=3,
            )
            self.exact = False
        self._kept, self._changed = self._fill(cut) if self.exact else [], cut.changed
        self._by_image = self._by_image and self._is_reversible()  # rows may be something other than images
        self._sorted = False

    def reorder(self, batches: Iterable, order: Tensor, sizes: Sequence[int]) -> None:
        """Continue with `batches`: the same images in the order of the indices `order` (n,), in batches of `sizes`.

        Kept activations are sorted in the same way if they have one row per image and copies fit into memory.
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
                old[index], sizes[index] = {}, 0  # replaced by the new results
            room -= size_of([results])
            while len(old) > index + 1 and sum(sizes) > room:
                del old[-1], sizes[-1]  # free memory; these batches are run through the whole network
            if room < 0:
                break
            kept.append(results)
            self._by_image &= has_rows(results, len(images))
        return kept

    def _is_reversible(self) -> bool:
        """Return whether reversing the rows of the kept activations reverses the rows of the logits."""
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
    """The point in the forward pass where one layer begins.

    Attributes:
        finished: submodules that have returned by then.
        read: outputs of these that are read later, as (module, call, tensor of that call); None: all.
        changed: modules whose outputs are later changed in place.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, finished: set[nn.Module]):
        self.model, self.layer, self.finished = model, layer, finished
        self.read: set[tuple[nn.Module, int, int]] | None = None
        self.changed: set[nn.Module] = set()

    def record(self, images: Tensor) -> Results:
        """Run the network up to the layer; return copies of outputs that are read later, else meta tensors."""
        results: Results = {}
        depth = 0

        def enter(*_) -> None:
            nonlocal depth
            depth += 1

        def leave(module: nn.Module, _, output) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:  # outside other finished modules
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
        raise ValueError("the forward pass does not reach the layer that it reached before")

    def _slim(self, module: nn.Module, call: int, output):
        leaves, structure = tree_flatten(output)
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor | IMMUTABLE):
                raise _Unrecorded(f"{type(module).__name__} returns a {type(leaf).__name__}, which may change later")
            if isinstance(leaf, Tensor):
                needed = self.read is None or (module, call, position) in self.read
                # A copy, because the network may change its own tensor in place.
                leaves[position] = leaf.clone() if needed else torch.empty_like(leaf, device="meta")
        return structure.unflatten(leaves)

    def obstacle(self, images: Tensor) -> str | None:
        """Find out which outputs are read; return why a replay with only these gives other logits, or None."""
        expected = self.model(images)
        try:
            results = self.record(images)
            with _Reads(results) as reads, returning(results):
                self.model(images)
            self.read, self.changed = reads.seen, {module for module, calls in results.items() if is_changed(calls)}
            results = self.record(images)
            # If modules share state outside their outputs, it now belongs to other images, and to more of them.
            self.model(torch.zeros_like(torch.cat([images, images])))
            for _ in range(2):  # the second time with the state that the first has left
                with returning(results, self.changed):
                    if not torch.equal(self.model(images), expected):
                        return "other logits"
            return None
        except _Unrecorded as reason:
            return str(reason)
        except Exception as error:  # a replayed forward may raise anything; the whole network has just run
            return f"{type(error).__name__}: {error}"


class _Reached(Exception):
    """The forward pass has reached the layer."""


def _stop(*_) -> None:
    raise _Reached


class _Unrecorded(Exception):
    """The output of a module cannot be kept."""


class _Reads(TorchFunctionMode):
    """Record which tensors of `results` are arguments of torch functions inside the block."""

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
        self._alive = results  # an id is unique only while its tensor exists

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for leaf in tree_flatten((args, kwargs))[0]:
            if id(leaf) in self._place:
                self.seen.add(self._place[id(leaf)])
        return func(*args, **(kwargs or {}))


def room_on(model: nn.Module) -> int:
    """Return the default number of bytes of activations that a replay may keep on the device of `model`."""
    gpu = next((parameter.device for parameter in model.parameters() if parameter.is_cuda), None)
    if gpu is None:
        return max(MIN_CPU_MEMORY, free_memory() // 3 // processes()[1])
    kept_by_torch = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)  # free, but reserved by torch
    return (torch.cuda.mem_get_info(gpu)[0] + kept_by_torch) // 2


def is_data(leaf) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta


def is_changed(calls: list) -> bool:
    """Return whether a tensor in `calls` was changed in place; True if that cannot be known (inference tensors)."""
    leaves = [leaf for leaf in tree_flatten(calls)[0] if isinstance(leaf, Tensor)]
    return any(leaf.is_inference() or leaf._version > 0 for leaf in leaves)


def size_of(kept: list[Results]) -> int:
    """Return the bytes of the activations in `kept`."""
    return sum(leaf.nbytes for results in kept for leaf in tree_flatten(list(results.values()))[0] if is_data(leaf))


def has_rows(results: Results, images: int) -> bool:
    """Return whether every tensor in `results` has one row per image."""
    return all(leaf.shape[:1] == (images,) for leaf in tree_flatten(results)[0] if is_data(leaf))


def reordered(kept: list[Results], order: Tensor, sizes: Sequence[int]) -> list[Results]:
    """Return `kept`, with one row per image in every tensor, in the order of the indices `order` over all batches."""
    flat = [tree_flatten(results) for results in kept]
    columns = [list(column) for column in zip(*(leaves for leaves, _ in flat))]
    for column in columns:
        if is_data(column[0]):
            column[:] = in_order(column, order).split(sizes)
    return [structure.unflatten(leaves) for leaves, (_, structure) in zip(zip(*columns), flat)]


def rows_of(results: Results, rows: Tensor) -> Results:
    """Select images of a batch; return {} if a module returned a number, which may be the batch size."""
    leaves, structure = tree_flatten(results)
    if any(isinstance(leaf, int | float | torch.Size) and not isinstance(leaf, bool) for leaf in leaves):
        return {}
    return structure.unflatten([leaf[rows.to(leaf.device)] if is_data(leaf) else leaf for leaf in leaves])


def joined(parts: Sequence[tuple[Results, Tensor, Tensor]]) -> tuple[Results, Tensor, Tensor]:
    """Concatenate the results, images and labels of several batches."""
    flat, structure = zip(*(tree_flatten(part) for part in parts))
    leaves = [torch.cat(column) if is_data(column[0]) else column[0] for column in zip(*flat, strict=True)]
    return structure[0].unflatten(leaves)


def in_order(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Return `torch.cat(parts)[order]` in a single copy; `order` (n,) contains no index twice."""
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
    """Make the modules in `results` return their kept outputs, one per call, inside the block.

    Those in `changed` return copies, because the network changes these outputs in place.
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
            raise _Unrecorded("a module's forward is called directly") from None
        return tree_map(lambda leaf: leaf.clone() if is_data(leaf) else leaf, output) if copies else output

    return forward


class Timeline(NamedTuple):
    """The order of events in one forward pass; calls and returns of modules are numbered.

    Attributes:
        calls: for each submodule, the begin and end of every call.
        reads: for each parameter, when it is first an argument of a torch function.
    """

    calls: dict[nn.Module, list[tuple[int, int]]]
    reads: dict[nn.Parameter, int]


class _FirstReads(TorchFunctionMode):
    def __init__(self, now: Callable[[], int]):
        super().__init__()
        self.now, self.seen = now, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) or getattr(func, "__name__", "") != "__get__":  # not a dtype or a shape
            for leaf in tree_flatten((args, kwargs))[0]:
                if isinstance(leaf, nn.Parameter):
                    self.seen.setdefault(leaf, self.now())
        return result


def timeline(model: nn.Module, images: Tensor) -> Timeline:
    """Run `model` once and record when modules are called and parameters read."""
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
    """Return `layer`, or the innermost module around it that is called, which then reads the layer's weight."""
    path = next(path for path, module in model.named_modules() if module is layer)
    while layer not in called and path:
        path = path.rpartition(".")[0]
        layer = model.get_submodule(path)
    return layer


def finished_before(seen: Timeline, layer: nn.Module, weights: Iterable[nn.Parameter]) -> set[nn.Module]:
    """Return the modules that have returned for good when `layer` is called or one of its `weights` is read."""
    begin = min([start for start, _ in seen.calls[layer]] + [seen.reads[one] for one in weights if one in seen.reads])
    return {module for module, calls in seen.calls.items() if all(end < begin for _, end in calls)}
