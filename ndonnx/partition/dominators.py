"""Dominator trees of acyclic graphs, in near-linear time however deep the graph is.

In a graph without cycles the immediate dominator of a node is the nearest common ancestor of its
predecessors in the tree built so far. Jump pointers (Myers, "An applicative random-access
stack", 1983) find it in a logarithmic number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)


@dataclass(eq=False)
class DominatorTree(Generic[Node]):
    """Every node hangs below its immediate dominator."""

    root: Node
    parent: dict[Node, Node] = field(default_factory=dict)
    """Immediate dominator of each node but the root."""
    depth: dict[Node, int] = field(default_factory=dict)
    jump: dict[Node, Node] = field(default_factory=dict)
    """An ancestor further up (the parent at the least; the root's is itself)."""

    @classmethod
    def of(cls, root: Node, order: Iterable[Node], before: Callable[[Node], Iterable[Node]]) -> DominatorTree[Node]:
        """Tree of the nodes that `root` reaches.

        Args:
            root: where every path begins.
            order: all other nodes, each after those before it.
            before: predecessors of a node; those that the root does not reach are passed over.
        """
        tree = cls(root, {}, {root: 0}, {root: root})
        for node in order:
            reached = [other for other in before(node) if other in tree.depth]
            if reached:
                above = reached[0]
                for other in reached[1:]:
                    above = tree.meet(above, other)
                tree._hang(node, above)
        return tree

    def _hang(self, node: Node, above: Node) -> None:
        jump = self.jump[above]
        self.parent[node] = above
        self.depth[node] = self.depth[above] + 1
        equal = self.depth[above] - self.depth[jump] == self.depth[jump] - self.depth[self.jump[jump]]
        self.jump[node] = self.jump[jump] if equal else above

    def meet(self, one: Node, other: Node) -> Node:
        """The nearest common ancestor (a node is its own ancestor)."""
        if self.depth[one] < self.depth[other]:
            one, other = other, one
        one = self._ancestor(one, self.depth[other])
        while one != other:
            far, away = self.jump[one], self.jump[other]
            one, other = (far, away) if far != away else (self.parent[one], self.parent[other])
        return one

    def _ancestor(self, node: Node, depth: int) -> Node:
        while self.depth[node] > depth:
            jump = self.jump[node]
            node = jump if self.depth[jump] >= depth else self.parent[node]
        return node

    def spans(self) -> dict[Node, tuple[int, int]]:
        """For each node a number, and the end of the numbers of all that it dominates."""
        size = dict.fromkeys(self.depth, 1)
        for node in reversed(self.parent):  # the tree was built from the root down
            size[self.parent[node]] += size[node]
        spans = {self.root: (0, size[self.root])}
        free = {self.root: 1}
        for node, above in self.parent.items():
            start = free[above]
            free[above] = start + size[node]
            spans[node] = (start, start + size[node])
            free[node] = start + 1
        return spans
