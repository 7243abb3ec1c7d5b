"""Which ids of a vocabulary are real, and whether two tokenizers mean the same by them. Dicts and hashes only; V is the
size of a vocabulary.

A model's embedding is often wider than its tokenizer: Qwen2.5 has 151,665 tokens and 151,936 or 152,064 rows, by the
size of the model. Two such models can be compared on the ids that their tokenizers share, which must be all of them: an
id that means another token would be trained on silently.
"""

from xlstm_hybrid.checkpoint.tokenizer import json_digest, token_ids
from xlstm_hybrid.errors import ConfigError


def meanings(tokenizer):
    """`{id: token}`; of several tokens with one id the first in the order of their text."""
    return {id: token for token, id in sorted(token_ids(tokenizer).items(), reverse=True)}


def real_ids(tokenizer):
    """Number of ids up to the last one with a token: rows of an embedding from there on are padding."""
    return max(token_ids(tokenizer).values()) + 1


def vocabulary_hash(tokenizer):
    """SHA-256 of what each id means, and of nothing else."""
    return json_digest(sorted(token_ids(tokenizer).items()))


def first_difference(student, teacher):
    """`(id, student's token, teacher's token)` of the lowest id that differs, None for no token; None if they agree."""
    student, teacher = meanings(student), meanings(teacher)
    wrong = min((id for id in student.keys() | teacher.keys() if student.get(id) != teacher.get(id)), default=None)
    return None if wrong is None else (wrong, student.get(wrong), teacher.get(wrong))


def shared_size(student_size, teacher_size, student_tokenizer=None, teacher_tokenizer=None):
    """V on which student and teacher are compared: their size if it is the same, else the real ids of both.

    Args:
        student_size, teacher_size: rows of the two LM heads.
        student_tokenizer, teacher_tokenizer: tokenizers or dicts {token: id}. With both the ids are compared, whatever
            the sizes.
    Raises:
        ConfigError: an id with two meanings, a token without a row, or sizes that differ and no tokenizers to say which
            ids are real.
    """
    if student_tokenizer is None or teacher_tokenizer is None:
        if student_size == teacher_size:
            return student_size
        raise ConfigError(
            f"the student's vocabulary has {student_size} tokens, the teacher's {teacher_size}: pass teacher_tokenizer beside the "
            "student's own, so that padding can be told from tokens, or distil from the teacher that was converted"
        )
    difference = first_difference(student_tokenizer, teacher_tokenizer)
    if difference is not None:
        id, ours, theirs = difference
        ours, theirs = ("no token" if token is None else repr(token) for token in (ours, theirs))
        raise ConfigError(
            f"the tokenizers differ first at id {id}: {ours} for the student, {theirs} for the teacher; distil from a teacher with "
            "the student's tokenizer"
        )
    real = real_ids(student_tokenizer)
    for name, size in ("student", student_size), ("teacher", teacher_size):
        if size < real:
            raise ConfigError(
                f"the tokenizer has {real} ids, the {name}'s LM head {size} rows: resize its embeddings, or load its own tokenizer"
            )
    return student_size if student_size == teacher_size else real
