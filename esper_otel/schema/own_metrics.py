"""Metrics of steps and seeds beyond those that were requested: what a Leyline packet needs, and our additions."""

from __future__ import annotations

from esper_otel.schema.metric import Metric, Need

_ONCE = "In the first step after each sample of the probe, about once a second."

OWN_STEP: tuple[Metric, ...] = (
    Metric("esper.global_step", "count", "Number of the step.", key="", present="In every frame."),
    Metric("esper.epoch", "count", "Epoch of the step.", key="", present="In every frame."),
    Metric("esper.seeds", "count", "Live seeds: recorded and not retired.", key="", present="In every frame."),
    Metric(
        "esper.seeds.digest",
        "1",
        "A checksum of the ids of all live seeds: a receiver compares it with that of the seeds it knows.",
        key="",
        source="Exclusive or, over the live seeds, of the first six bytes of the SHA-256 of the id; 0 without seeds.",
        present="In every frame.",
        misleads="A number, but not a quantity: all that matters is whether two of them are equal.",
    ),
    Metric(
        "esper.training.loss",
        "loss",
        "The last finite training loss, so that a controller can subtract the losses of any two packets.",
        key="training_loss",
        present="From the first finite loss on.",
        misleads="It repeats an old loss while the loss is missing or not finite.",
    ),
    Metric(
        "esper.validation.loss",
        "loss",
        "Validation loss, as of the last validation().",
        key="validation_loss",
        present="In every frame after telemetry.validation(loss=...).",
        misleads="It stays until the next validation.",
    ),
    Metric(
        "esper.validation.accuracy",
        "ratio",
        "Validation accuracy, 0 to 1, as of the last validation().",
        key="",
        present="In every frame after telemetry.validation(accuracy=...).",
        misleads="It stays until the next validation.",
    ),
    Metric(
        "esper.epochs.total",
        "count",
        "Planned number of epochs.",
        key="epochs_total",
        present="In every frame when start(epochs=...) was given.",
    ),
    Metric(
        "esper.optimizer.lr",
        "1",
        "Learning rate of the host's optimizer.",
        key="optimizer_lr",
        present="When recorded: now.put(optimizer_lr=...).",
    ),
    *(
        Metric(
            f"esper.{part}_ms",
            "ms",
            description,
            key="",
            source="On the CPU the host's clock; on CUDA two events on the current stream, resolved later. "
            "If it is entered several times, the times add up.",
            present=f'With now.part("{part}"), and in steps of watch, esper-otel run and the callbacks where it can be '
            "told; on CUDA unless tolaria_step_enrichment_enabled is False.",
            misleads=misleads,
            window="The step.",
            error="A few microseconds, on the host's clock.",
            cost="On the CPU two readings of a clock; on CUDA two events, without waiting.",
            rise=rise,
        )
        for part, description, misleads, rise in (
            (
                "forward",
                "Part of the step latency: the forward pass.",
                "Told without a call, it lasts from the batch's arrival until backward() begins, with the loss.",
                "The model, the loss or moving the batch takes longer.",
            ),
            (
                "backward",
                "Part of the step latency: the backward pass.",
                "With several ranks it contains the exchange of gradients, and the wait for the slowest rank.",
                "The backward pass takes longer, or another rank does.",
            ),
            (
                "optimizer",
                "Part of the step latency: the optimizer's step.",
                "A closure that the optimizer calls is in it, without what is told as forward and backward.",
                "The optimizer's step takes longer.",
            ),
        )
    ),
    Metric(
        "esper.optimizer.index",
        "1",
        "Number of the optimizer that made the step, from 0, in the order in which they were first seen.",
        key="",
        present="In steps of loops with several optimizers, under watch and esper-otel run.",
    ),
    Metric(
        "esper.isolation.violations",
        "count",
        "Isolation violations new in this step, over all seeds recorded in it.",
        key="kasmina.isolation.violations",
        present="When a seed's isolation_violations is recorded in the step.",
        misleads="It is not a running total; the metric of each seed is.",
    ),
    Metric(
        "esper.step.failed",
        "flag",
        "1 when the step raised an exception; its frame contains the values recorded before that.",
        key="",
        present="Only in failed steps.",
    ),
    Metric(
        "esper.steps.backwards",
        "count",
        "How often this attempt recorded a step number that was not higher than all numbers before it.",
        key="",
        present="From the first such step on.",
    ),
    Metric(
        "esper.device.memory_total_gb",
        "GB",
        "Memory of the training device (of the host on CPU), in GiB.",
        gated=True,
        key="",
        present="While the probe's last sample is fresh.",
    ),
    Metric(
        "esper.device.memory_available_gb",
        "GB",
        "Available memory of the host when training on CPU, in GiB; on CUDA see gpu_mem_free_gb.",
        gated=True,
        key="",
        present="While the probe's last sample is fresh.",
    ),
    Metric(
        "esper.device.temperature_celsius",
        "Cel",
        "Temperature of the training device.",
        gated=True,
        needs=(Need.NVML,),
        key="",
        present="While the probe's last sample is fresh.",
    ),
    Metric(
        "esper.tokens_per_s",
        "rate",
        "Tokens per second of the whole cycle, waiting for input included.",
        key="",
        source="tokens / (input_wait_ms + step_latency_ms), as samples_per_s.",
        present="When the step is given tokens=.",
        misleads="It counts what the trainer says, padding included or not.",
    ),
    Metric(
        "esper.tflops_per_s",
        "TFLOP/s",
        "Floating-point operations of the model per second of the whole cycle on this rank, in 10^12.",
        key="",
        source="flops / (input_wait_ms + step_latency_ms), as samples_per_s.",
        present="When the step is given flops=.",
        misleads="Operations that the device repeats, as with activation checkpointing, should not be counted.",
    ),
    Metric(
        "esper.mfu",
        "ratio",
        "Model FLOPs utilisation: esper.tflops_per_s divided by the highest rate of the training device.",
        key="",
        source="The device's dense rate for ESPER_COMPUTE_DTYPE from the vendor's data sheet, or ESPER_PEAK_TFLOPS.",
        present="When the step is given flops= and the highest rate is known; else telemetry.absent() has the reason.",
        misleads="Steps of different dtypes are measured against different rates; the rate is that of the boost clock.",
    ),
    Metric(
        "esper.memory.process_gb",
        "GB",
        "Resident memory of the training process, in GiB, without its loader workers.",
        gated=True,
        key="",
        needs=(Need.PSUTIL,),
        misleads="Pages shared with other processes count in each of them.",
        present=_ONCE,
    ),
    Metric(
        "esper.memory.host_used_gb",
        "GB",
        "Memory in use on the host, or in the container if it has a limit, in GiB.",
        gated=True,
        key="",
        needs=(Need.PSUTIL,),
        present=_ONCE,
    ),
    Metric(
        "esper.memory.host_available_gb",
        "GB",
        "Memory that is available on the host, or in the container if it has a limit, in GiB.",
        gated=True,
        key="",
        needs=(Need.PSUTIL,),
        misleads="It includes page cache that can be dropped.",
        present=_ONCE,
    ),
    Metric(
        "esper.memory.swap_used_gb",
        "GB",
        "Swap in use on the host, in GiB.",
        gated=True,
        key="",
        needs=(Need.PSUTIL,),
        present=_ONCE,
    ),
    Metric(
        "esper.memory.torch_allocated_gb",
        "GB",
        "Memory of live tensors on the training device, in GiB.",
        gated=True,
        key="",
        source="torch.cuda.memory_stats(), or torch.mps.current_allocated_memory().",
        present=_ONCE,
    ),
    Metric(
        "esper.memory.torch_reserved_gb",
        "GB",
        "Memory that PyTorch's allocator holds on the training device, in GiB.",
        gated=True,
        key="",
        source="torch.cuda.memory_stats(), or torch.mps.driver_allocated_memory().",
        present=_ONCE,
    ),
    Metric(
        "esper.memory.torch_peak_gb",
        "GB",
        "Highest esper.memory.torch_allocated_gb so far, in GiB.",
        gated=True,
        key="",
        needs=(Need.CUDA,),
        source="torch.cuda.memory_stats(): since the start, or the program's own reset_peak_memory_stats().",
        present=_ONCE,
    ),
    Metric(
        "esper.memory.torch_retries",
        "count",
        "How often PyTorch's allocator has freed its cache because an allocation failed.",
        gated=True,
        key="",
        needs=(Need.CUDA,),
        source="num_alloc_retries of torch.cuda.memory_stats(), since the start of the process.",
        present=_ONCE,
    ),
)

# Only the step exporter sends these two; they are not among the instruments that readers collect.
FRAME_SEQUENCE = Metric(
    "esper.frame.sequence",
    "count",
    "Number of the frame within (attempt, rank): 1, 2, ... without holes.",
    key="",
    present="In every frame sent over OTLP.",
)

FRAME_POINTS = Metric(
    "esper.frame.points",
    "count",
    "Number of points with the frame's time, including this one.",
    key="",
    present="In every frame sent over OTLP.",
)

# Not a cell of the seed's row, because it concerns a life that has ended. Only the step exporter sends it.
SEED_RETIRED = Metric(
    "esper.seed.retired",
    "flag",
    "1 when the seed was retired after the previous frame; its other points in this frame begin a new life.",
    level="seed",
    present="In the frame after the retirement, sent over OTLP.",
    misleads="It is an event, one point whose series is not ended: a database shows it until its look-back is over.",
)

OWN_SEED: tuple[Metric, ...] = (
    Metric("esper.seed.learning_rate", "1", "Learning rate of the seed's optimizer.", level="seed"),
    Metric("esper.seed.layer_depth", "count", "Depth of the layer that the seed grows in.", level="seed"),
    Metric("esper.seed.age_epochs", "count", "Epochs since the seed germinated.", level="seed"),
    Metric("esper.seed.risk_score", "1", "Risk that the seed's owner assigns to it.", level="seed"),
    Metric("esper.seed.gradient_norm", "grad", "L2 norm of the seed's own gradients.", level="seed"),
    Metric("esper.seed.alpha_total_steps", "count", "Planned number of blending steps.", level="seed"),
    Metric("esper.seed.alpha_temperature", "1", "Temperature of the blending schedule.", level="seed"),
    Metric("esper.seed.risk_tolerance", "1", "Risk above which the seed is to be culled.", level="seed"),
    Metric(
        "esper.seed.blend_allowed",
        "flag",
        "1 when the seed may blend; if it is not recorded, packets contain 1 in the stages 4 to 7.",
        level="seed",
    ),
)
