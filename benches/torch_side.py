"""A process that measures PyTorch once: python -m benches.torch_side SIDE CASE DATA

It prints what it found as JSON, or the reason for having nothing under `error`.
"""

import json
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .cases import ADAMW, CLIP_NORM, LEARNING_RATE, NUM_WARM_UP_STEPS, Case, matrix_products
from .published import Llama
from .usage import Usage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A product is repeated until it has taken this long.
PRODUCT_S = 0.2
SQUARE_SIZE = {"cpu": 2048, "cuda": 8192}


def train(case, data, is_fused=True, is_compiled=False, model_class=Llama):
    """Trains for some updates and returns their figures."""
    device = torch.device(case.device)
    model = model_class(case).to(device, DTYPES[case.dtype])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Without `fused` PyTorch takes what it takes by default: foreach on a GPU, a loop on the CPU.
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=is_fused or None, **ADAMW)
    loss_of = torch.compile(model, dynamic=False) if is_compiled else model
    batches = read_batches(case, data, device)

    for step in range(NUM_WARM_UP_STEPS):
        timed_update(case, loss_of, trained, optimizer, batches[step])
    usage = Usage(counts_resident=case.device == "cpu")
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speeds = [timed_update(case, loss_of, trained, optimizer, batches[step % len(batches)])
              for step in range(case.num_steps)]
    figures = usage.figures(speeds, case.tokens_per_step)
    if case.device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def train_library(case, data):
    from . import library  # what it imports is there where tests run, and need not be beside a GPU

    return train(case, data, model_class=library.Llama)


def read_batches(case, data, device):
    tokens = np.fromfile(Path(data) / "train.bin", dtype="<u2").astype(np.int64)
    return torch.from_numpy(tokens).view(-1, case.num_seqs, case.sequence_length).to(device)


def timed_update(case, loss_of, trained, optimizer, batch):
    """Returns the speed in tokens/s."""
    started = time.perf_counter()
    update(case, loss_of, trained, optimizer, batch)
    synchronize(case)
    return case.tokens_per_step / (time.perf_counter() - started)


def update(case, loss_of, trained, optimizer, batch):
    """One update as the published loop makes it: the loss is read, and a norm that is not finite is an error."""
    loss_sum = 0.0
    for rows in batch.split(case.micro_batch_seqs):
        loss = loss_of(rows) * (len(rows) / case.num_seqs)
        loss.backward()
        loss_sum += loss.item()
    torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum


def synchronize(case):
    if case.device == "cuda":
        torch.cuda.synchronize()


def measure_products(case, _data):
    """The rate of `torch.mm` at the shapes of the case, each as often as a step has it, and at a large square."""
    flops, duration_s, duration_cpu_s = 0, 0.0, 0.0
    for (m, k, n, layout), count in matrix_products(case).items():
        product_s, product_cpu_s = time_product(case, m, k, n, layout)
        flops += count * 2 * m * k * n
        duration_s += count * product_s
        duration_cpu_s += count * product_cpu_s
    size = SQUARE_SIZE[case.device]
    square_s, _ = time_product(case, size, size, size, "nn")
    return {
        "flops_per_s": flops / duration_s,
        "flops_per_cpu_s": flops / duration_cpu_s,
        "square_flops_per_s": 2 * size**3 / square_s,
    }


def time_product(case, m, k, n, layout):
    """The time of one product (m, k) (k, n) into memory that is there, and the processor time."""
    left, right, out = matrix(case, m, k, layout[0]), matrix(case, k, n, layout[1]), matrix(case, m, n, "n")
    torch.mm(left, right, out=out)
    count = 1
    while True:
        synchronize(case)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(count):
            torch.mm(left, right, out=out)
        synchronize(case)
        elapsed_s, elapsed_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        if elapsed_s >= PRODUCT_S:
            return elapsed_s / count, elapsed_cpu_s / count
        count *= 2


def matrix(case, num_rows, num_columns, layout):
    shape = (num_columns, num_rows) if layout == "t" else (num_rows, num_columns)
    values = torch.randn(shape, device=case.device).to(DTYPES[case.dtype])
    return values.t() if layout == "t" else values


SIDES = {
    "eager_fused": train,
    "eager_unfused": partial(train, is_fused=False),
    "compiled": partial(train, is_compiled=True),
    "library": train_library,
    "products": measure_products,
}


def main():
    side, case, data = sys.argv[1], Case.from_json(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(7)
    try:
        result = SIDES[side](case, data)
    except Exception as error:  # whatever PyTorch or its compiler raises: it is a result
        traceback.print_exc()
        result = {"error": str(error).strip().partition("\n")[0] or type(error).__name__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
