"""One request: which token follows, what text it makes, when it ends."""

import torch
from tokenizers.decoders import DecodeStream
from transformers.generation import GenerationMode

from xlstm_hybrid.errors import ConfigError

DEFAULT_TOKENS = 1024  # of an answer where neither request nor checkpoint says how many
MODES = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
NOT_SHARED = {"guidance_scale": 1.0, "max_time": None, "num_return_sequences": 1}  # settings, and where they do nothing


class Text:
    """The text of tokens as they come, up to the first of the strings in `stop`.

    Joined, the pieces are what the tokenizer decodes the tokens to, special ones left out.
    """

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.stream, self.sent, self.held = DecodeStream(skip_special_tokens=True), "", ""

    def push(self, token):
        """`(piece, whether a stop string ended it)`; what may be the beginning of a stop string is held back."""
        self.held += self.stream.step(self.tokenizer.backend_tokenizer, token) or ""
        found = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        end = min(found) if found else len(self.held) - self.begun()
        return self.send(end), bool(found)

    def begun(self):
        """How many of the last characters begin a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        tails = (n for n in range(min(longest, len(self.held)), 0, -1))
        return next((n for n in tails if any(text.startswith(self.held[-n:]) for text in self.stop)), 0)

    def send(self, end):
        piece, self.held = self.held[:end], self.held[end:]
        self.sent += piece
        return piece

    def rest(self, tokens):
        """What has been held back; a character whose bytes have not all come is in it as the tokenizer shows it."""
        whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return whole[len(self.sent) :] if whole.startswith(self.sent) else self.held


class Request:
    """A prompt on its way through the engine.

    tokens: ids of prompt and answer.  prompt: number of the prompt's.
    deliver: called in the engine's thread with `(piece of text, reason)`; the reason is None until the last piece, then
    "stop", "length", "cancelled" or "error".
    read, cache: how much of the prompt has been read, and into what; the cache goes to the running batch.
    came: when.  last: text that the end brings.
    """

    def __init__(self, model, tokenizer, ids, settings, deliver, stop=(), seed=0):
        """settings: a GenerationConfig, of which everything counts that chooses the next token of a row.

        Raises:
            ConfigError: an empty prompt, settings that one row at a time cannot follow (beams, drafts), or values that
                are none.
        """
        if not ids:
            raise ConfigError("the prompt has no tokens, expected at least one: write something")
        self.tokens, self.prompt, self.deliver = list(ids), len(ids), deliver
        self.read, self.cache, self.cancelled, self.came, self.last = 0, None, False, None, ""
        settings, _ = model._prepare_generation_config(settings)
        refuse_unshared(settings)
        self.limit = settings.max_new_tokens or DEFAULT_TOKENS
        settings.max_length = self.prompt + self.limit
        ends = settings.eos_token_id
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self.device, before = model.device, torch.tensor([self.tokens], device=model.device)
        try:
            model._prepare_special_tokens(settings, True, device=model.device)
            self.processors = model._get_logits_processor(
                settings, input_ids_seq_length=self.prompt, encoder_input_ids=before, device=model.device
            )
            # once for show: some look at their values only here
            self.processors(before, torch.zeros(1, model.config.vocab_size, device=model.device))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"generation settings: {error}; correct them or leave them out") from error
        self.generator = torch.Generator(model.device).manual_seed(seed) if settings.do_sample else None
        more = settings.stop_strings or ()
        self.text = Text(tokenizer, (*stop, *([more] if isinstance(more, str) else more)))

    @property
    def greedy(self):
        """Whether the token with the largest logit follows, as it is."""
        return self.generator is None and not self.processors

    def choose(self, logits):
        """The id that follows by `logits` [vocabulary]."""
        scores = self.processors(torch.tensor([self.tokens], device=self.device), logits[None].float())
        if self.generator is None:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))

    def take(self, token):
        """Add a token and deliver its text; returns why the request ends with it, or None. The last text stays in `last`
        until the engine has let the row go.
        """
        self.tokens.append(token)
        piece, stopped = self.text.push(token)
        reason = "stop" if stopped or token in self.ends else None
        if reason is None and len(self.tokens) - self.prompt >= self.limit:
            reason = "length"
        if reason and not stopped:
            piece += self.text.rest(self.tokens[self.prompt :])
        if reason:
            self.last = piece
        elif piece:
            self.deliver(piece, None)
        return reason


def refuse_unshared(settings):
    """Raise ConfigError for generation settings beyond the choice of a row's next token."""
    wrong = {n: x for n, free in NOT_SHARED.items() if (x := getattr(settings, n, None)) not in (None, free)}
    if (mode := settings.get_generation_mode()) not in MODES:
        wrong["mode"] = str(mode.value)
    if wrong:
        raise ConfigError(
            f"generation settings {wrong}: requests share decode steps, expected greedy search or sampling of one answer; leave them out"
        )
