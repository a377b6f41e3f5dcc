"""Of what was found: how more of it comes into view, and who is not back where somebody else is seen."""

import pytest
import torch
from scripted import NOTHING, C, Seen, frame_mask, play

from ausm_hf import AusmInferenceSession
from ausm_hf.model import identities_ausm

HEAD = Seen((0, 1, 0, 2), 0.95, dog=0.4, logit=6.0)  # found as it comes into view
PERSON = Seen((0, 4, 0, 3), 0.7, dog=0.4)  # all of it
BODY = Seen((1, 4, 0, 3), 0.9, dog=0.4)


def test_who_comes_into_view_is_one_object(monkeypatch):
    """With the id that its first part had, and its votes; for the network it is one that was not there before."""
    begun_anew = []
    monkeypatch.setattr(identities_ausm, "without_trace", lambda history, gone: begun_anew.append(gone) or history)
    model, session, outputs = play([({}, [HEAD, C]), ({1: HEAD, 2: C}, [PERSON]), ({1: PERSON, 2: C}, [])])
    assert [output.object_ids for output in outputs] == [[1, 2], [2, 1], [2, 1]]
    masks = torch.stack([C.mask, PERSON.mask])
    assert (outputs[1].pred_masks[:, 0] > 0).equal(masks) and model.histories[2].masks[0].equal(masks.float())
    assert begun_anew == [[], [0], []]
    assert session.next_object_id == 3
    votes = 0.95 + 0.95 + 0.7 + 0.7  # the head, twice; all of it as it is found and as it is followed
    torch.testing.assert_close(session.objects[1].class_votes, votes * torch.tensor([0.6, 0.4]))
    assert outputs[2].scores[1].item() == pytest.approx(0.7 * 0.7 * 0.6)


def test_what_was_seen_of_it_stays():
    head, most = Seen((0, 2, 0, 3), 0.8, logit=6.0), Seen((0, 4, 1, 4), 0.7)  # four of the head's six cells
    _, _, outputs = play([({}, [head]), ({1: head}, [most])])
    assert outputs[1].object_ids == [1] and (outputs[1].pred_masks[0, 0] > 0).equal(head.mask | most.mask)


def test_what_it_looks_like_is_learnt_anew():
    head, person = Seen(HEAD.box, 0.95, look=1.5), Seen(PERSON.box, 0.95, look=3.0)
    script = [({}, [head]), ({1: head}, []), ({1: head}, [person]), ({1: person}, [])]
    _, session, outputs = play(script[:2], likeness_scale=20)
    assert session.objects[0].looks is not None
    _, session, outputs = play(script[:3], likeness_scale=20)
    assert session.objects[0].looks is None
    assert play(script, likeness_scale=20)[2][3].object_ids == [1]


@pytest.mark.parametrize(
    "drawn",
    [
        Seen(PERSON.box, 0.7, dog=0.6),  # under another name
        Seen((0, 4, 1, 4), 0.7, dog=0.4),  # half of the head
        Seen(PERSON.box, 0.45, dog=0.4),  # not sure enough to be an object
    ],
)
def test_another_one_is_not_more_of_it(drawn):
    _, _, outputs = play([({}, [HEAD]), ({1: HEAD}, [drawn])])
    assert outputs[1].object_ids == ([1, 2] if drawn.foreground > 0.5 else [1])
    assert (outputs[1].pred_masks[0, 0] > 0).equal(HEAD.mask)


def test_what_draws_two_of_them_is_neither():
    other = Seen((0, 1, 2, 3), 0.8, dog=0.4, logit=6.0)
    _, _, outputs = play([({}, [HEAD, other]), ({1: HEAD, 2: other}, [PERSON])])
    assert outputs[1].object_ids == [1, 2, 3]


def test_what_was_marked_is_what_the_user_says():
    session = AusmInferenceSession(seed=0, find_new_objects=True)
    _, _, outputs = play([({1: HEAD}, []), ({1: HEAD}, [PERSON])], session, {0: {1: frame_mask(HEAD)}})
    assert outputs[1].object_ids == [1, 2] and (outputs[1].pred_masks[0, 0] > 0).equal(HEAD.mask)


def test_who_has_grown_keeps_its_place_where_all_are_taken():
    sure = Seen((3, 4, 5, 6), 0.95)
    script = [({}, [HEAD, C]), ({1: HEAD, 2: C}, [sure, PERSON]), ({1: PERSON, 2: C}, [])]
    _, session, outputs = play(script, num_id_vectors=2)
    assert [output.object_ids for output in outputs] == [[1, 2], [2, 1], [2, 1]]
    assert (outputs[1].pred_masks[1, 0] > 0).equal(PERSON.mask)


@pytest.mark.parametrize(
    ("drawn", "ids"),
    [
        (Seen(PERSON.box, 0.45, dog=0.4), [2]),
        (Seen(BODY.box, 0.45, dog=0.4), [1, 2]),  # without the head
        (Seen(PERSON.box, 0.45, dog=0.6), [1, 2]),  # under another name
    ],
)
def test_nobody_is_back_where_somebody_else_is_seen(drawn, ids):
    """Who has left claims the body of the next one, whose head is followed."""
    script = [({}, [BODY]), ({1: NOTHING}, [HEAD]), ({1: BODY, 2: HEAD}, [drawn])]
    assert [output.object_ids for output in play(script)[2]] == [[1], [2], ids]


def test_what_nobody_is_told_of_stays_apart():
    """A bystander is there to keep its pixels from what was marked, and so is what comes beside it."""
    script = [({1: C}, [HEAD]), ({1: C, -1: HEAD}, [PERSON]), ({1: C, -1: HEAD, -2: BODY}, [])]
    model, session, _ = play(script, prompts={0: {1: frame_mask(C)}})
    assert [x.object_id for x in session.objects] == [1, -1, -2]
    assert model.histories[2].masks[0].equal(torch.stack([C.mask, HEAD.mask, PERSON.mask & ~HEAD.mask]).float())
