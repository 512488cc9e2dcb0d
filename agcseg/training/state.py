"""What a run remembers: made anew, saved, and loaded so that it goes on as if it had not stopped."""

import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from agcseg.config import Config, build_network
from agcseg.errors import UserError
from agcseg.networks import Network
from agcseg.nn import GEMS, add_noise
from agcseg.training import parallel
from agcseg.training.machine import channels_last
from agcseg.training.recipe import make_average, make_optimizer, make_schedule


@dataclass
class State:
    """A network in training, and all that was measured on the way.

    Attributes:
        schedule: of the rate; None for a constant one.
        average: of the weights over steps, or None.
        losses: (epochs, steps, parts) float32, of every training step: of the classes and, where the network finds
            contours, of the contour.
        idle_mib: memory in use before training, see `agcseg.training.machine.idle_memory`.
        kept_mib: what autograd keeps from forward to backward, measured in the first step of this process.
        rows: of metrics.csv, one for each epoch that is done.
        layers: of layers.csv, see `agcseg.record.tables.layer_rows`.
        lambdas: number of steps trained -> `agcseg.record.tables.lambdas_of`, on the CPU.
        images: of images.csv, the last validation, image by image.
        picture: predictions.png, or empty.
        noises: state of the noise's generator in each process, after the last epoch; process 0 saves them.
    """

    network: Network
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None
    average: AveragedModel | None
    noise: torch.Generator | None
    gems: GEMS | None
    losses: Tensor
    idle_mib: float = 0.0
    kept_mib: float = 0.0
    rows: list[dict] = field(default_factory=list)
    layers: list[dict] = field(default_factory=list)
    lambdas: dict[int, Tensor] = field(default_factory=dict)
    images: list[dict] = field(default_factory=list)
    picture: bytes = b""
    noises: list[Tensor] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.rows)

    @property
    def result(self) -> nn.Module:
        """The network that is validated: the averaged one where there is one."""
        return self.average.module if self.average else self.network

    @property
    def is_best(self) -> bool:
        """Whether no epoch before the last one had as low a validation pixel error."""
        *before, last = [row["pixel_error"] for row in self.rows]
        return last < min(before, default=math.inf)

    def last(self, key: str) -> float:
        """A figure of the last epoch, 0 before the first."""
        return self.rows[-1][key] if self.rows else 0

    def saved(self) -> dict:
        """For a checkpoint: tensors and plain Python values."""
        return {
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "average": self.average and self.average.state_dict(),
            "noise": self.noises,
            "gems": self.gems and self.gems.averages,
            "rows": self.rows,
            "layers": self.layers,
            "lambdas": self.lambdas,
            "losses": self.losses,
            "images": self.images,
            "picture": torch.frombuffer(bytearray(self.picture), dtype=torch.uint8) if self.picture else None,
        }

    def load(self, saved: dict) -> None:
        """Go back, or on, to a checkpoint."""
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        _lay_out(self.optimizer)
        # Of another number of processes, or another kind of device, each begins with the seed of its own.
        if self.noise and list(map(len, saved["noise"])) == [len(self.noise.get_state())] * parallel.world():
            self.noise.set_state(saved["noise"][parallel.rank()])
        if self.gems:
            self.gems.averages = saved["gems"]
        self.rows, self.layers, self.images = saved["rows"], saved["layers"], saved["images"]
        self.lambdas, self.losses = saved["lambdas"], saved["losses"]
        if saved["picture"] is not None:
            self.picture = saved["picture"].numpy().tobytes()


def begin(config: Config, num_classes: int, steps: int, device: torch.device) -> State:
    """The state before the first epoch.

    Args:
        steps: of an epoch.

    Raises:
        UserError: the network cannot be made as `config` wants it.
    """
    torch.manual_seed(config.seed)
    network = build_network(config, num_classes).to(device)
    if channels_last(config.channels_last, device):
        network.to(memory_format=torch.channels_last)
    if config.sync_bn and parallel.world() > 1:
        if device.type == "cpu":
            raise UserError("sync_bn=true: torch synchronises batch normalisation on GPUs only")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    average, noise, gems = make_average(network, config), None, None
    if config.noise.gain or config.noise.shift:
        own_seed = config.seed * parallel.world() + parallel.rank()
        noise = add_noise(network, config.noise.gain, config.noise.shift, own_seed)
    if config.gems.mode:
        gems = GEMS(network, **asdict(config.gems))
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config)
    return State(network, optimizer, schedule, average, noise, gems, torch.empty(0, steps, 1 + network.contour))


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's buffers the memory layout of their parameters, which another `channels_last` may have
    changed: fused optimisers pair them element by element as they lie in memory."""
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)
