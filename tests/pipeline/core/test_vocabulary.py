"""The words and phrases of triage: each is written as the search for it expects, and is found where it stands."""

import re

import pytest

from pipeline.core import lexical, vocabulary

LISTS = {
    **vocabulary.SIGN_WORDS,
    "attributes": vocabulary.ATTRIBUTES,
    "greeting": vocabulary.GREETING_WORDS,
    "sum": vocabulary.SUM_WORDS,
}
JOBS = {**vocabulary.JOB_PHRASES, "brief": vocabulary.BRIEF_PHRASES}


def signs(text):
    return lexical.signs(lexical.normalize(text))


def phrases_of(listed):
    return [" ".join(phrase.split()) for phrase in listed.split(",")]


@pytest.mark.parametrize("sign", vocabulary.SIGN_WORDS)
def test_stems_have_the_letters_that_the_index_goes_by(sign):
    stems = [word for word in vocabulary.SIGN_WORDS[sign].split() if word.endswith("*")]
    assert [stem for stem in stems if len(stem) < 5] == []


@pytest.mark.parametrize("sign", vocabulary.SIGN_WORDS)
def test_every_word_of_a_sign_is_met_as_it_stands(sign):
    for word in vocabulary.SIGN_WORDS[sign].split():
        assert signs(word.removesuffix("*"))[sign] >= 1, word


@pytest.mark.parametrize("sign", vocabulary.SIGN_PHRASES)
def test_every_phrase_of_a_sign_is_met_as_it_stands(sign):
    for phrase in vocabulary.SIGN_PHRASES[sign]:
        assert signs(f"so {phrase} so")[sign] >= 1, phrase


def test_phrases_are_spelled_as_normalized_text_is():
    phrases = [phrase for group in vocabulary.SIGN_PHRASES.values() for phrase in group]
    assert [phrase for phrase in phrases if lexical.normalize(phrase) != phrase] == []


@pytest.mark.parametrize("name", LISTS)
def test_a_list_holds_words_in_small_letters_each_once(name):
    words = LISTS[name].split()
    assert [word for word in words if not re.fullmatch(r"\w+\*?", word) or word != word.lower()] == []
    assert sorted(words) == sorted(set(words))


@pytest.mark.parametrize("name", JOBS)
def test_phrases_of_jobs_are_words_of_normalized_text_each_once(name):
    phrases = phrases_of(JOBS[name])
    assert [phrase for phrase in phrases if not re.fullmatch(r"\w+( \w+)*\*?", phrase)] == []
    assert [
        phrase for phrase in phrases if lexical.normalize(phrase.removesuffix("*")) != phrase.removesuffix("*")
    ] == []
    assert sorted(phrases) == sorted(set(phrases))


@pytest.mark.parametrize("job", vocabulary.JOB_PHRASES)
def test_every_phrase_of_a_job_names_it(job):
    for phrase in phrases_of(vocabulary.JOB_PHRASES[job]):
        assert lexical.kind(lexical.normalize(f"{phrase.removesuffix('*')}: Hans")) is not None, phrase
