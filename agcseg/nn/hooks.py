"""Whether a call of a module does what its class says: what is computed in another way must not pass over more."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: pruning, the old weight norm, whatever users hang on."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(own) or nn.modules.module._has_any_global_hook()


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody has replaced the forward of this one object, as is done for circular padding."""
    own = vars(module)
    return "forward" in own or "_conv_forward" in own
