"""Edits that cross module borders: a functional convolution becomes a module inside an emitted fx graph.

Only the module that calls the convolution becomes a GraphModule. Its graph must be the same in train and
eval mode, because a traced graph freezes what ``forward`` decided from ``self.training``.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from convrewrite.annotate import functional_arguments
from convrewrite.capture import FUNCTIONAL_CONVS, light_copy
from convrewrite.errors import EditError


class _OwnTracer(fx.Tracer):
    """Traces one module's own forward; every child but a plain container is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def obstacle(model: nn.Module, path: str) -> str | None:
    """Why the functional convolution "owner:weight" cannot be replaced, or None."""
    owner, _, weight = path.rpartition(":")
    module = model.get_submodule(owner)
    name = type(module).__name__
    try:
        graphs = _both_modes(module)
    except Exception as error:
        return f"{name} cannot be traced: {(str(error) or repr(error)).splitlines()[0]}"
    if graphs is None:
        return f"the forward of {name} depends on train or eval mode; a graph would freeze it"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has hooks, which a graph would drop"
    nodes = _uses(graphs, weight)
    if len(nodes) != 1:
        several = f"{name} uses {weight} {len(nodes)} times"
        return several if nodes else f"its weight is computed or not owned by {name}"
    for key in ("weight", "bias"):
        value = functional_arguments(nodes[0]).get(key)
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr" or len(value.users) > 1:
            return f"its {key} is computed or used by several operations"
        if not isinstance(_attribute(module, str(value.target)), nn.Parameter):
            return f"its {key} is not a parameter"
    return None


def convolution(model: nn.Module, path: str) -> nn.Conv2d:
    """An ``nn.Conv2d`` that holds the very parameters that the functional convolution "owner:weight" uses."""
    owner, _, weight_name = path.rpartition(":")
    module = model.get_submodule(owner)
    values = functional_arguments(_node(module, path))
    weight = _attribute(module, weight_name)
    bias = _attribute(module, str(values["bias"].target)) if values.get("bias") is not None else None
    groups = values.get("groups", 1)
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=values.get("stride", 1),
        padding=values.get("padding", 0),
        dilation=values.get("dilation", 1),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    conv.weight, conv.bias = weight, bias
    return conv.train(module.training)


def parameter_keys(model: nn.Module, path: str) -> list[str]:
    """State-dict keys of the parameters that the functional convolution "owner:weight" uses."""
    owner = path.rpartition(":")[0]
    values = functional_arguments(_node(model.get_submodule(owner), path))
    names = [str(v.target) for k in ("weight", "bias") if isinstance(v := values.get(k), fx.Node)]
    return [f"{owner}.{name}" if owner else name for name in names]


def with_module(model: nn.Module, path: str, new: nn.Module) -> fx.GraphModule:
    """The owner as a GraphModule in which `new` computes what the functional convolution did."""
    owner, _, weight = path.rpartition(":")
    module = model.get_submodule(owner)
    name = "convrewrite_" + weight.replace(".", "_")
    graphs = _both_modes(module)
    if graphs is None:
        raise EditError("its forward depends on train or eval mode", where=owner)
    node = _uses(graphs, weight)[0]
    taken = {str(v.target) for k in ("weight", "bias") if isinstance(v := functional_arguments(node).get(k), fx.Node)}
    module.add_module(name, new)
    with graphs.inserting_before(node):
        call = graphs.call_module(name, (functional_arguments(node)["input"],))
    node.replace_all_uses_with(call)
    graphs.erase_node(node)
    for unused in [n for n in graphs.nodes if n.op == "get_attr" and not n.users]:
        graphs.erase_node(unused)
    emitted = fx.GraphModule(module, graphs, class_name=type(module).__name__)
    for key, tensor in module._parameters.items():  # what the graph does not use would be lost
        if key not in emitted._parameters and key not in taken:
            emitted.register_parameter(key, tensor)
    for key, buffer in module._buffers.items():
        emitted.register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)
    for key, child in module._modules.items():
        if key not in emitted._modules:
            emitted.add_module(key, child)
    emitted.training = module.training
    return emitted


def is_mode_free(module: nn.Module) -> bool:
    """True if the module's own forward is the same in train and eval mode."""
    return _both_modes(module) is not None


def _both_modes(module: nn.Module) -> fx.Graph | None:
    """The graph of the module's own forward, or None if it differs between train and eval mode."""
    twin = light_copy(module)
    texts = []
    graph = fx.Graph()
    for training in (True, False):
        twin.train(training)
        graph = _OwnTracer().trace(twin)
        texts.append([(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes])
    return graph if texts[0] == texts[1] else None


def _node(module: nn.Module, path: str) -> fx.Node:
    graph = _both_modes(module)
    nodes = _uses(graph, path.rpartition(":")[2]) if graph is not None else []
    if len(nodes) != 1:
        raise EditError("no such functional convolution", where=path)
    return nodes[0]


def _uses(graph: fx.Graph, weight: str) -> list[fx.Node]:
    """The functional convolutions that use the attribute as their weight."""
    found = []
    for node in graph.nodes:
        value = functional_arguments(node).get("weight") if node.target in FUNCTIONAL_CONVS else None
        if isinstance(value, fx.Node) and value.op == "get_attr" and value.target == weight:
            found.append(node)
    return found


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
