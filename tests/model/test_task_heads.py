"""Heads besides the language model's, as transformers has them for a Llama: scores of rows, classes of tokens, spans of
answers.
"""

import pytest
import torch
from conftest import enlarge, tiny_config, token_ids
from tiny_students import CLOSE, left_padded
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import xlstm_hybrid

KINDS = {
    "XLSTMHybridForSequenceClassification": AutoModelForSequenceClassification,
    "XLSTMHybridForTokenClassification": AutoModelForTokenClassification,
    "XLSTMHybridForQuestionAnswering": AutoModelForQuestionAnswering,
}


def made(name, **changes):
    changes = {} if "Question" in name else {"num_labels": 3, **changes}
    return enlarge(getattr(xlstm_hybrid, name)(tiny_config(pad_token_id=5, **changes)).double()).eval()


@pytest.mark.parametrize("name", KINDS)
def test_the_auto_classes_load_a_head_with_its_weights(name, tmp_path):
    model, ids = made(name), token_ids(2, 19)
    model.save_pretrained(tmp_path)
    loaded = KINDS[name].from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(ids).to_tuple()[0], model(ids).to_tuple()[0], rtol=0, atol=0)


def test_a_row_is_scored_at_its_last_real_token_on_whichever_side_its_padding_is():
    model = made("XLSTMHybridForSequenceClassification")
    rows = [token_ids(1, length, seed=length).clamp_min(6) for length in (9, 23)]
    alone = torch.cat([model(row).logits for row in rows])
    hidden = [model.model(row).last_hidden_state[:, -1] for row in rows]
    torch.testing.assert_close(alone, model.score(torch.cat(hidden)), **CLOSE)
    ids, mask = left_padded(rows)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, **CLOSE)
    right = torch.full_like(ids, 5)
    right[0, :9], right[1] = rows[0][0], rows[1][0]
    torch.testing.assert_close(model(right, attention_mask=(right != 5).long()).logits, alone, **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_a_head_learns_by_heart(name):
    torch.manual_seed(0)
    model, ids = made(name).train(), token_ids(4, 12).clamp_min(6)
    labels = (
        {"labels": torch.tensor([0, 1, 2, 1])}
        if "Sequence" in name
        else {"labels": ids % 3}
        if "Token" in name
        else {"start_positions": torch.tensor([1, 4, 2, 9]), "end_positions": torch.tensor([3, 6, 2, 11])}
    )
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(25):
        loss = model(ids, **labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    new = [p for n, p in model.named_parameters() if any(part in n for part in ("score", "qa_outputs", "mlstm"))]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new)
