"""The floor: the encoder's product alone, x @ W_enc with W_enc [d, n], once per batch, into memory that is there."""

from __future__ import annotations

import sys

import torch

from sae_training.job import Job
from sae_training.pacing import Decoded, Paced


def main() -> None:
    job = Job.load(sys.argv[1])
    paced = Paced(job, version=torch.__version__, includes="torch.mm(x, W_enc, out=h)")
    W_enc = torch.randn(job.d, job.n, device=job.device)
    h = torch.empty(job.batch, job.n, device=job.device)
    for x in paced.batches():
        torch.mm(x, W_enc, out=h)
    paced.finish(lambda x: Decoded(x, x.new_zeros(len(x))))


if __name__ == "__main__":
    main()
