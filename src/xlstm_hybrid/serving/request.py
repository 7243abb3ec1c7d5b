"""One request: which token follows, what text it makes, when it ends."""

import torch
from tokenizers.decoders import DecodeStream
from transformers.generation import GenerationMode

from xlstm_hybrid.errors import ConfigError

DEFAULT_TOKENS = 1024  # of an answer where neither request nor checkpoint says how many
MODES = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
# settings, and where they do nothing
NOT_SHARED = {"guidance_scale": 1.0, "max_time": None, "num_return_sequences": 1, "token_healing": False}


class Text:
    """The text of tokens as they come, up to the first of the strings in `stop`.

    Joined, the pieces are what the tokenizer decodes the tokens to, special ones left out. With bytes that make no
    character some tokenizers would change what has been sent, which stays: what follows is decoded by itself.
    """

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.stream, self.sent, self.held = DecodeStream(skip_special_tokens=True), "", ""
        self.unread = []  # tokens since the last that made text

    def push(self, token):
        """`(piece, whether a stop string ended it)`; what may be the beginning of a stop string is held back."""
        self.held += self.decoded(token)
        found = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        end = min(found) if found else len(self.held) - self.begun()
        return self.send(end), bool(found)

    def decoded(self, token):
        """The text that a token adds, which is empty where a character is not complete."""
        self.unread.append(token)
        try:
            piece = self.stream.step(self.tokenizer.backend_tokenizer, token)
        except Exception:  # of no class of its own: text before is another one now
            piece = self.tokenizer.decode(self.unread, skip_special_tokens=True)
            self.stream = DecodeStream(self.unread, skip_special_tokens=True)
        if piece is not None:
            self.unread = []
        return piece or ""

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
        if whole.startswith(self.sent):
            return whole[len(self.sent) :]
        return self.held + self.tokenizer.decode(self.unread, skip_special_tokens=True)


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
            ConfigError: a prompt without tokens, or with some that the model does not have, settings that one row at a
                time cannot follow (beams, drafts), or values that are none.
        """
        if not ids:
            raise ConfigError("the prompt has no tokens, expected at least one: write something")
        if max(ids) >= model.config.vocab_size:  # on a GPU it would end the process
            raise ConfigError(
                f"the prompt has token {max(ids)}, expected less than {model.config.vocab_size}, the model's vocabulary: leave it out"
            )
        self.tokens, self.prompt, self.deliver = list(ids), len(ids), deliver
        self.read, self.cache, self.cancelled, self.came, self.last = 0, None, False, None, ""
        before = self.before = torch.tensor([self.tokens], device=model.device)  # of tokens, as processors look at them
        longest = settings.max_length or model.generation_config.max_length  # a default of 20 stands there below
        settings, _ = model._prepare_generation_config(settings)
        refuse_unshared(settings)
        try:
            self.limit = settings.max_new_tokens or (longest - self.prompt if longest else DEFAULT_TOKENS)
            if self.limit < 1:
                raise ValueError(f"max_length={longest} with a prompt of {self.prompt} tokens")
            settings.max_length = self.prompt + self.limit
            if settings.min_new_tokens is not None:
                settings.min_length = self.prompt + settings.min_new_tokens
            self.text = Text(tokenizer, (*stop, *strings(settings.stop_strings)))
            model._prepare_special_tokens(settings, True, device=model.device)
            ends = settings._eos_token_tensor
            self.ends = frozenset([] if ends is None else ends.flatten().tolist())
            self.processors = model._get_logits_processor(
                settings, input_ids_seq_length=self.prompt, encoder_input_ids=before, device=model.device
            )
            # once for show: some look at their values only here
            self.processors(before, torch.zeros(1, model.config.vocab_size, device=model.device))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"generation settings: {error}; correct them or leave them out") from error
        self.generator = torch.Generator(model.device).manual_seed(seed) if settings.do_sample else None

    @property
    def greedy(self):
        """Whether the token with the largest logit follows, as it is."""
        return self.generator is None and not self.processors

    def choose(self, logits):
        """The id that follows by `logits` [vocabulary].

        Raises:
            ValueError: settings that leave no probabilities to draw by.
        """
        new = self.tokens[self.before.shape[1] :]  # a long prompt is not copied from a list for each token
        self.before = torch.cat([self.before, self.before.new_tensor([new])], 1)
        scores = self.processors(self.before, logits[None].float())
        if self.generator is None:
            return int(scores.argmax(-1))
        probabilities = scores.softmax(-1)
        if probabilities.isnan().any():  # a draw would end a GPU's process
            raise ValueError("no probabilities: logits, or what the settings make of them, are not finite")
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

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


def strings(value):
    """`stop_strings` as a list."""
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"stop_strings={value!r}, expected a string or a list of them")
    return [text for text in found if text]


def refuse_unshared(settings):
    """Raise ConfigError for generation settings beyond the choice of a row's next token."""
    wrong = {n: x for n, free in NOT_SHARED.items() if (x := getattr(settings, n, None)) not in (None, free)}
    if (mode := settings.get_generation_mode()) not in MODES:
        wrong["mode"] = str(mode.value)
    if wrong:
        raise ConfigError(
            f"generation settings {wrong}: requests share decode steps, expected greedy search or sampling of one answer; leave them out"
        )
