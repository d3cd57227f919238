"""An executor without a model, strict about its inputs: the next token is a function of the whole sequence,
which it reads back through slot mapping and page table, as attention does."""

from itertools import pairwise

import torch

from fastkernels.runtime.step import StepBuffers

EMPTY = -1


class FakeExecutor:
    def __init__(
        self,
        *,
        vocab_size: int = 97,
        num_pages: int = 64,
        page_size: int = 4,
        max_num_seqs: int = 8,
        max_num_tokens: int = 64,
        max_seq_len: int = 64,
    ) -> None:
        self.vocab_size = vocab_size
        self.page_size = page_size
        self.inputs = StepBuffers(max_num_tokens, max_num_seqs, -(-max_seq_len // page_size), "cpu")
        self.memory = torch.full((num_pages * page_size,), EMPTY, dtype=torch.int64)
        self.calls: list[tuple[str, int, int]] = []
        self.fail_at: int | None = None

    def replay(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> torch.Tensor:
        self.calls.append(("replay", num_tokens, num_logits))
        return self._step(num_tokens, num_logits, max_query_len)

    def run(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> torch.Tensor:
        self.calls.append(("run", num_tokens, num_logits))
        return self._step(num_tokens, num_logits, max_query_len)

    def _step(self, num_tokens: int, num_logits: int, max_query_len: int) -> torch.Tensor:
        if self.fail_at == len(self.calls):
            raise RuntimeError("the device caught fire")
        x = self.inputs
        ids = x.token_ids[:num_tokens].long()
        ids = torch.where(ids < 0, x.sampled[(-ids - 1).clamp(min=0)].long(), ids)
        cu = x.cu_seqlens_q.tolist()
        assert cu[0] == 0 and cu == sorted(cu) and cu[-1] <= num_tokens
        assert max_query_len in (0, max(end - begin for begin, end in pairwise(cu)))
        assert (x.slot_mapping[cu[-1] : num_tokens] == -1).all() and (ids[cu[-1] :] == 0).all()
        assert (x.slot_mapping[: cu[-1]] >= 0).all()
        self.memory[x.slot_mapping[: cu[-1]]] = ids[: cu[-1]]
        next_ids = torch.zeros(num_tokens, dtype=torch.int64)
        for row in range(x.max_num_seqs):
            begin, end, length = cu[row], cu[row + 1], int(x.seq_lens[row])
            if begin == end:
                assert length == 0
                continue
            assert x.positions[begin:end].tolist() == list(range(length - (end - begin), length))
            pages = x.page_table[row, : -(-length // self.page_size)].long()
            slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()[:length]
            tokens = self.memory[slots]
            assert (tokens != EMPTY).all()
            running = ((tokens + 1) * torch.arange(3, length + 3)).cumsum(0) % self.vocab_size
            next_ids[begin:end] = running[length - (end - begin) :]
        logits = torch.zeros(num_logits, self.vocab_size)
        chosen = next_ids[x.logits_indices[:num_logits].long()]
        logits[torch.arange(num_logits), chosen] = 5.0
        return logits


def continuation(prompt: list[int], num_tokens: int, vocab_size: int = 97) -> list[int]:
    """What FakeExecutor generates after a prompt, token for token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(sum((token + 1) * (index + 3) for index, token in enumerate(tokens)) % vocab_size)
    return tokens[len(prompt) :]
