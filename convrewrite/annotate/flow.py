"""The way of the feature maps through one region: ancestors, gates taken out, and the trunk's cut nodes.

A *cut* is a node that every path from the input to the main output goes through. Between two neighbouring
cuts lies either nothing (a straight line) or parallel paths: a block. Gates (squeeze-and-excitation) are
taken out first, so that a gated straight line stays a straight line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from convrewrite.annotate.kinds import is_feature, is_mul, is_pool
from convrewrite.capture import Region


class Flow:
    """Ancestor sets and cuts of a region's feature graph.

    Args:
        main: the node to take for the main output; by default the output that most convolutions feed.

    Attributes:
        sources, raw: inputs and ancestors of every node, gates included.
        outputs: the nodes that the region returns.
        live: nodes on a path from an input to the main output, in graph order.
        gates: nodes that compute a gate.
        aside: convolution nodes that feed only other outputs (auxiliary classifiers).
        cuts: the trunk, in order.
    """

    def __init__(self, region: Region, convs: list[fx.Node], main: fx.Node | None = None) -> None:
        self.region = region
        self.nodes = [n for n in region.graph.nodes if n.op != "output" and self._carries(n)]
        self.index = {n: i for i, n in enumerate(self.nodes)}
        self.inputs = {n: [i for i in n.all_input_nodes if i in self.index] for n in self.nodes}
        self.conv_bits = sum(1 << self.index[c] for c in convs if c in self.index)
        self.sources = dict(self.inputs)
        self.ancestors = self.raw = self._ancestors()
        self.outputs = self._outputs()
        self.main = main or self._main_output()
        self.gates = self._take_out_gates()
        self.ancestors = self._ancestors()
        self.live = self._live()
        live = set(self.live)
        self.inputs = {n: [i for i in self.inputs[n] if i in live] for n in self.live}
        self.cuts = self._cuts()

    def _carries(self, node: fx.Node) -> bool:
        """True if the node yields feature maps (or a tuple of tensors); sizes and constants do not count."""
        return node.op != "get_attr" and self.region.shapes.get(node) is not None

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """The set of nodes as a bit mask."""
        mask = 0
        for n in nodes:
            mask |= 1 << self.index[n]
        return mask

    def members(self, bits: int) -> Iterator[fx.Node]:
        """The nodes of a bit mask in graph order."""
        while bits:
            low = bits & -bits
            yield self.nodes[low.bit_length() - 1]
            bits ^= low

    def upto(self, node: fx.Node) -> int:
        """The node and all its ancestors."""
        return self.ancestors[node] | (1 << self.index[node])

    def _ancestors(self) -> dict[fx.Node, int]:
        found: dict[fx.Node, int] = {}
        for node in self.nodes:
            mask = 0
            for source in self.inputs.get(node, ()):
                mask |= found[source] | (1 << self.index[source])
            found[node] = mask
        return found

    def _outputs(self) -> list[fx.Node]:
        output = next(n for n in self.region.graph.nodes if n.op == "output")
        ends: list[fx.Node] = []
        for node in output.all_input_nodes:
            packs = node.op == "call_function" and isinstance(node.target, type)  # a named tuple of outputs
            ends.extend(n for n in (node.all_input_nodes if packs else [node]) if n in self.index)
        return ends

    def _main_output(self) -> fx.Node | None:
        """Of the output's tensors the one that most convolutions feed; the first of equals."""
        return max(self.outputs, key=lambda n: (self.upto(n) & self.conv_bits).bit_count(), default=None)

    def _take_out_gates(self) -> set[fx.Node]:
        """For x * g(x): cut the edge from the gate and return the nodes that compute it."""
        gates: set[fx.Node] = set()
        for node in self.nodes:
            sources = self.inputs[node]
            if len(sources) != 2 or not is_mul(self.region, node):
                continue
            gate, other = self._gate(sources[0], sources[1])
            if gate is None or other is None:
                continue
            own = self.upto(gate) & ~self.upto(other)
            gates.update(self.members(own))
            self.inputs[node] = [other]
        return gates

    def _gate(self, a: fx.Node, b: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """(gate, gated): the gate's own nodes hold a pooling, or its map is one pixel or one channel."""
        for gate, other in ((b, a), (a, b)):
            own = list(self.members(self.upto(gate) & ~self.upto(other)))
            if not own:
                continue
            shape: Any = self.region.shapes.get(gate)
            wide: Any = self.region.shapes.get(other)
            small = is_feature(shape) and is_feature(wide) and shape[2:] == (1, 1) and wide[2:] != (1, 1)
            if small or any(is_pool(self.region, n) and self._global(n) for n in own):
                return gate, other
        return None, None

    def _global(self, node: fx.Node) -> bool:
        shape: Any = self.region.shapes.get(node)
        return bool(shape) and (len(shape) < 4 or shape[2:] == (1, 1))

    def _live(self) -> list[fx.Node]:
        if self.main is None:
            return []
        above = self.upto(self.main)
        reached: set[fx.Node] = set()
        for node in self.nodes:
            fed = node.op == "placeholder" or any(i in reached for i in self.inputs[node])
            if fed and above >> self.index[node] & 1:
                reached.add(node)
        return [n for n in self.nodes if n in reached]

    def _cuts(self) -> list[fx.Node]:
        """Nodes that no edge jumps over, by one scan in graph order."""
        order = {n: i for i, n in enumerate(self.live)}
        last_use = {n: order[n] for n in self.live}
        for node in self.live:
            for source in self.inputs[node]:
                last_use[source] = max(last_use[source], order[node])
        first_input = next((n for n in self.live if n.op == "placeholder"), None)
        cuts, reach = [], -1
        for node in self.live:
            position = order[node]
            starts = node.op == "placeholder" and node is not first_input
            if reach <= position and not starts:
                cuts.append(node)
            reach = max(reach, last_use[node])
        return cuts
