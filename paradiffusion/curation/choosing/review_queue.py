"""How the review page keeps what a person decides and sends it: the first part of its script.

Every event lies in the browser's local storage until it is acknowledged, so that neither a closed tab nor a server that
is away loses one. Events have names, so that one that is sent twice is written once.
"""

from __future__ import annotations

QUEUE = r"""
'use strict';
const $ = id => document.getElementById(id);
const settings = JSON.parse($('settings').textContent);
const token = new URLSearchParams(location.search).get('token') || '';
const own = crypto.getRandomValues(new Uint32Array(4)).join('-');  // this tab
const PREFIX = `review:${settings.id}:`;
let reviewer = read(`${PREFIX}reviewer`) || settings.reviewer;
let samples = [], listing = '', numbers = new Map(), known = new Map(), revision = 0;
let current = -1, shown = null, waiting = false, away = false, counter = 0, walk = 0;
const described = new Map(), history_ = JSON.parse(session('undo') || '[]');
const queue = new Map();  // event key -> event; a copy of each lies in local storage
const typing = {caption: null, note: null};  // the event that a text field is writing, until the pause

function read(key) { try { return localStorage.getItem(key); } catch { return null; } }
function session(key, value) {
  try { return value === undefined ? sessionStorage.getItem(PREFIX + key) : sessionStorage.setItem(PREFIX + key, value); }
  catch { return null; }
}
function keep(event) {
  queue.set(event.key, event);
  try { localStorage.setItem(`${PREFIX}queue:${event.key}`, JSON.stringify(event)); }
  catch { say('This browser stores nothing: do not close the tab before "saved" is shown.', true); }
}
function forget(event) {
  if (queue.get(event.key) === event) queue.delete(event.key);
  try {
    const stored = JSON.parse(localStorage.getItem(`${PREFIX}queue:${event.key}`) || 'null');
    if (stored && stored.event === event.event) localStorage.removeItem(`${PREFIX}queue:${event.key}`);
  } catch { /* nothing was stored */ }
}
function adopt() {  // what tabs left behind that are gone; the server writes none of it twice
  try {
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      if (!key.startsWith(`${PREFIX}queue:`)) continue;
      const event = JSON.parse(localStorage.getItem(key));
      if (!queue.has(event.key) && event.tab !== own && Date.now() - event.at > 5000) queue.set(event.key, event);
    }
  } catch { /* no storage */ }
}

async function ask(path, options = {}) {
  const control = new AbortController(), timer = setTimeout(() => control.abort(), 15000);
  try {
    const answer = await fetch(path, {...options, signal: control.signal, cache: 'no-store',
      headers: {'X-Token': token, ...(options.body ? {'Content-Type': 'application/json'} : {})}});
    const content = await answer.json();
    if (!answer.ok) throw Object.assign(new Error(content.error), {status: answer.status});
    return content;
  } finally { clearTimeout(timer); }
}

function make(changes, sample = shown.sample) {
  const name = `${own}-${++counter}`;
  return {key: name, event: `${name}:0`, tab: own, sample, reviewer, at: Date.now(), version: 0,
    base: (known.get(sample) || {at: 0}).at, set: changes};
}
const wire = ({event, sample, reviewer, at, base, set}) => JSON.stringify({event, sample, reviewer, at, base, set});

let sending = null;
function flush() {  // one at a time, the oldest first
  sending = sending || sendAll().finally(() => { sending = null; });
  return sending;
}
async function sendAll() {
  for (let pause = 300; queue.size;) {
    const event = [...queue.values()].sort((a, b) => a.at - b.at)[0];
    for (const field of ['caption', 'note']) if (typing[field] === event) stopTyping(field);
    // Events of one tab follow each other: what it was told meanwhile, it knew.
    event.base = event.tab === own ? Math.max(event.base, (known.get(event.sample) || {at: 0}).at) : event.base;
    try {
      const answer = await ask('/api/decision', {method: 'POST', body: wire(event)});
      forget(event);
      stands(event.sample, answer);
      conflict(event, answer);
      away = false; pause = 300;
      say(queue.size ? `${queue.size} to save` : 'saved');
    } catch (error) {
      if ([400, 404, 413, 415].includes(error.status)) {  // it would be refused for ever: out of the way, but not lost
        forget(event);
        try { localStorage.setItem(`${PREFIX}refused:${event.key}`, JSON.stringify(event)); } catch { /* no storage */ }
        say(`Not saved: ${error.message}.`, true);
        if (event.tab === own) event.refused = true;
        continue;
      }
      unreachable(error);
      await new Promise(go => setTimeout(go, pause));
      pause = Math.min(pause * 1.6, 4000);
    }
  }
}
function unreachable(error) {
  away = true;
  say(error.status ? `The server refuses: ${error.message}. ${queue.size} to save; they are kept in this browser.`
    : `The server does not answer. ${queue.size} to save; kept in this browser and sent again.`, true);
}
function stands(sample, answer) {  // what stands now, as the server counts it
  known.set(sample, {at: answer.revision, by: answer.by});
  if (shown && shown.sample === sample) verdict();
  counts();
}
function conflict(event, answer) {
  for (const [field, value] of Object.entries(answer.conflicts)) {
    const what = {caption: 'description', note: 'note', decision: 'decision'}[field];
    const ours = (answer.by[event.reviewer]?.[field] ?? null) === event.set[field];
    notice(`Another tab of ${event.reviewer} had set the ${what} to: ${value ?? 'undecided'}\n`
      + `${ours ? 'Yours stands now' : 'It is the later one, and stands'}; the log keeps both.`,
      ours && field === 'caption' && event.sample === shown?.sample ? value : null);
  }
}
function notice(text, theirs = null) {
  $('notice-text').textContent = text;
  $('theirs').hidden = theirs === null;
  $('theirs').onclick = () => { $('caption').value = theirs; typed('caption'); $('notice').hidden = true; };
  $('notice').hidden = false;
}
$('close').onclick = () => { $('notice').hidden = true; };
"""
