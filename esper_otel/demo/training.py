"""The training loop. It uses only the public interface of ``esper_otel``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import esper_otel
from esper_otel import EsperSettings, Packets, Step, Telemetry
from esper_otel.demo.data import load
from esper_otel.demo.host import Host
from esper_otel.demo.kasmina import Kasmina
from esper_otel.demo.pace import Pace
from esper_otel.demo.receiver import Receiver
from esper_otel.demo.result import DemoResult, Puller, reasons
from esper_otel.demo.tamiyo import Decision, Tamiyo

BATCH_SIZE = 64
MICRO_BATCHES = 4
LEARNING_RATE = 0.006
EXPERIMENT = "digits"


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run.

    Attributes:
        steps: number of training steps.
        seeds: number of seeds that may grow.
        random_seed: random seed for the weights and the order of the images.
        has_enrichment: whether gated metrics are recorded; None leaves the choice to the environment.
    """

    steps: int
    seeds: int
    random_seed: int
    has_enrichment: bool | None = None


def run(plan: Plan, receiver: Receiver, observe: Callable[[Packets, Decision], None]) -> DemoResult:
    """Trains; every step is sent and pulled. Ctrl-C ends the run early and returns the result so far.

    Args:
        plan: the parameters of the run.
        receiver: the receiver of the frames.
        observe: called with the pulled packets of each step and Tamiyo's decision in the latest step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(plan, device)
    has_enrichment = plan.has_enrichment
    settings = (
        EsperSettings() if has_enrichment is None else EsperSettings(tolaria_step_enrichment_enabled=has_enrichment)
    )
    with (
        receiver.open(),
        esper_otel.start(experiment=EXPERIMENT, settings=settings, epochs=training.epochs, device=device) as telemetry,
    ):
        puller = Puller(telemetry)
        is_interrupted = False
        try:
            training.run(telemetry, puller, observe)
        except KeyboardInterrupt:
            is_interrupted = True
        absent = telemetry.absent()
        telemetry.close(outcome="interrupted" if is_interrupted else None)
        for _ in puller.pull():  # the device values of the last steps may have arrived only now
            pass
    health = telemetry.health()
    metrics = puller.metrics
    return DemoResult(
        run_id=telemetry.run_id,
        steps=len(training.losses),
        is_interrupted=is_interrupted,
        losses=tuple(loss.item() for loss in training.losses),
        validation=training.validation,
        frames={
            "recorded": _count(health["recorded"]),
            "exported": _count(health["exported"]),
            "received": receiver.frames_received,
            "dropped": _count(health["dropped"]),
        },
        packets={"states": puller.states, "telemetry": puller.telemetry},
        metrics=metrics,
        absent=reasons(metrics, absent),
        destination=receiver.destination,
        last_error=None if health["last_error"] is None else str(health["last_error"]),
        export={name: health[name] for name in ("retries", "latency_ms", "buffer_bytes")},
    )


class Training:
    """Host, seeds, controller and data of one run.

    Attributes:
        epochs: number of epochs that the steps begin.
        losses: the losses of all steps so far, detached.
        validation: loss and accuracy of the last validation.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._digits = load(batch_size=BATCH_SIZE, random_seed=plan.random_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.random_seed)
            self._host = Host().to(device)
        pace = Pace.of(plan.steps)
        self._kasmina = Kasmina(self._host, seeds=plan.seeds, pace=pace, random_seed=plan.random_seed)
        self._tamiyo = Tamiyo(pace)
        self._decision = Decision()
        self._optimizer = torch.optim.Adam(self._host.parameters(), lr=LEARNING_RATE)
        self.epochs: int = -(-plan.steps // len(self._digits.batches))
        self.losses: list[Tensor] = []
        self.validation: tuple[float, float] | None = None

    def run(self, telemetry: Telemetry, puller: Puller, observe: Callable[[Packets, Decision], None]) -> None:
        """Runs all epochs. The last one ends with the last step."""
        for epoch in range(self.epochs):
            for images, targets in telemetry.batches(self._digits.batches):
                with telemetry.step(epoch=epoch, samples=len(targets)) as now:
                    self._step(now, images, targets)
                for packets in puller.pull():
                    observe(packets, self._decision)
                if len(self.losses) == self._plan.steps:
                    break
            self._kasmina.finalize_epoch()
            self.validation = self._validate()
            telemetry.validation(loss=self.validation[0], accuracy=self.validation[1])

    def _step(self, now: Step, images: Tensor, targets: Tensor) -> None:
        host, kasmina = self._host, self._kasmina
        images, targets = now.to(self._device, images, targets)
        logits = host(images, kasmina.growing(now.kernel))
        losses = cross_entropy(logits, targets, reduction="none")
        loss = losses.mean()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss, retain_graph=True)
        kasmina.measure(loss, targets)
        now.gradients(host, sources=self._sources(losses))
        self._optimizer.step()
        kasmina.step()
        now.put(loss=loss, accuracy=(logits.argmax(1) == targets).float().mean(), optimizer_lr=LEARNING_RATE)
        kasmina.record(now)
        with now.hook():
            with now.tamiyo():
                self._decision = self._tamiyo.evaluate_step(now.state())
            with now.apply():
                kasmina.apply(self._decision.commands)
        with now.finalize():
            kasmina.finalize_step()
        self.losses.append(loss.detach())

    def _sources(self, losses: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Returns the host's gradient for each micro-batch, for the gradient conflict rate."""
        parameters = list(self._host.parameters())
        return {
            f"micro-batch-{number}": torch.autograd.grad(part.mean(), parameters, retain_graph=True)
            for number, part in enumerate(losses.chunk(MICRO_BATCHES), start=1)
        }

    def _validate(self) -> tuple[float, float]:
        images, targets = (tensor.to(self._device) for tensor in self._digits.held_out)
        with torch.no_grad():
            logits = self._host(images, self._kasmina.grown)
            right = (logits.argmax(1) == targets).float().mean()
            return cross_entropy(logits, targets).item(), right.item()


def _count(number: float | str | None) -> int:
    return int(number or 0)
