// Shows a candidate, takes texts and decisions into a queue that is sent, then goes on.
//
// Every event lies in the browser's local storage until it is acknowledged, so that neither a closed tab nor a server that
// is away loses one. Events have names, so that one that is sent twice is written once.
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
    if (answer.ok) return await answer.json();
    const reason = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(reason.error || answer.statusText), {status: answer.status});
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

const bytes = new TextEncoder();
function tooLong() {  // such a text would be refused: the last one that was not stays stored, and this one in its field
  for (const [field, what] of [['caption', 'description'], ['note', 'note']]) {
    if (!shown || $(field).value === (mine(shown.sample)[field] ?? shown[field] ?? '')) continue;
    const over = bytes.encode(JSON.stringify($(field).value)).length - settings.most;
    if (over > 0) { say(`Not saved: the ${what} is ${over} bytes too long. Shorten it first.`, true); return true; }
  }
  return false;
}
function typed(field) {  // every keystroke is kept here, every pause is sent
  words();
  if (tooLong()) return;
  const value = $(field).value, pending = typing[field];
  const event = pending || make({[field]: value});
  const next = {...event, version: event.version + 1, at: Date.now(), set: {[field]: value}};
  next.event = `${event.key}:${next.version}`;
  clearTimeout(next.timer);
  keep(next);
  typing[field] = next;
  clearTimeout(typed[field]);
  typed[field] = setTimeout(() => { if (typing[field]) { stopTyping(field); flush(); } }, 500);
  say('…');
}
function stopTyping(field) { clearTimeout(typed[field]); typing[field] = null; }
async function settle() {
  const any = typing.caption || typing.note;
  stopTyping('caption'); stopTyping('note');
  if (any || queue.size) await flush();
}

const mine = sample => (known.get(sample)?.by[reviewer]) || {};
const decided = sample => mine(sample).decision || null;
function matches(number) {
  const filter = $('filter').value, is = decided(samples[number]);
  return filter === 'all' || (filter === 'undecided' ? !is : is === filter);
}
function next(from, step = 1) {
  for (let i = 1; i <= samples.length; i++) {
    const number = ((from + step * i) % samples.length + samples.length) % samples.length;
    if ((number !== from || !shown) && matches(number)) return number;
  }
  return -1;
}

async function decide(value) {
  if (waiting || !shown || tooLong()) return;
  busy(true);
  try {
    const {sample} = shown, before = decided(sample), number = current;
    const event = make({decision: value});
    keep(event);
    await settle();  // on disk before anything else is shown
    if (event.refused) return;
    history_.push([sample, before]);
    session('undo', JSON.stringify(history_.slice(-500)));
    const to = next(number);
    if (to >= 0) await show(to); else if (!matches(number)) finished();
  } finally { busy(false); }
}
async function undo() {
  if (waiting || tooLong()) return;
  const last = history_.pop();
  session('undo', JSON.stringify(history_));
  if (!last || !numbers.has(last[0])) return go(-1);
  busy(true);
  try {
    await settle();
    keep(make({decision: last[1]}, last[0]));
    await flush();
    await show(numbers.get(last[0]));
  } finally { busy(false); }
}
async function go(step) {
  if (waiting || tooLong()) return;
  busy(true);
  try { await settle(); const to = next(current, step); if (to >= 0) await show(to); else if (!shown) finished(); }
  finally { busy(false); }
}
async function jump(number) {  // to any picture, whatever the filter
  if (waiting || tooLong()) { if (shown) $('number').value = current + 1; return; }
  if (!Number.isInteger(number) || number < 0 || number >= samples.length) {
    say(`There are pictures 1 to ${samples.length}.`, true);
    if (shown) $('number').value = current + 1;
    return;
  }
  if (shown && number === current) return;
  busy(true);
  try { await settle(); await show(number); } finally { busy(false); }
}
function busy(on) { waiting = on; document.body.classList.toggle('waiting', on); }

async function describe(number) {
  if (!described.has(number)) described.set(number, await ask(`/api/candidate/${number}`));
  return described.get(number);
}
async function show(number) {
  const mineNow = ++walk;
  let about = null;
  for (let pause = 300; !about;) {
    try { about = await describe(number); }
    catch (error) {
      unreachable(error);
      if (error.status === 404 || mineNow !== walk) return;
      await new Promise(go => setTimeout(go, pause)); pause = Math.min(pause * 1.6, 4000);
    }
  }
  if (mineNow !== walk) return;
  if (about.sample !== samples[number]) { location.reload(); return; }  // the candidates were chosen anew
  current = number; shown = about;
  history.replaceState(null, '', `${location.pathname}${location.search}#${number + 1}`);
  zoom(false);
  $('done').hidden = true;
  const image = $('image');
  image.hidden = false;
  const seen = load(number);
  texts();
  $('number').value = number + 1;
  for (const field of ['caption', 'note']) $(field).disabled = false;
  $('key').textContent = `${about.shard} / ${about.key}`;
  $('captions').replaceChildren(...Object.entries(about.captions).map(([kind, text]) => {
    const line = document.createElement('p'), name = document.createElement('b');
    name.textContent = `${kind}: `; line.append(name, text); return line;
  }));
  $('scores').tBodies[0].replaceChildren(...Object.entries({score: about.score, cluster: about.cluster, ...about.scores}).map(row => {
    const line = document.createElement('tr');
    for (const cell of row) line.insertCell().textContent = typeof cell === 'number' ? +cell.toPrecision(4) : cell;
    return line;
  }));
  verdict();
  await seen;  // no decision on a picture that is not there yet
  if (mineNow !== walk) return;
  document.body.dataset.number = number;
  const after = next(number);
  if (after >= 0) { describe(after).catch(() => {}); new Image().src = picture(after); }
}
// Named by its sample too: a browser keeps pictures, and their numbers mean others once candidates are chosen anew.
const picture = number => `/image/${number}?sample=${samples[number]}&token=${encodeURIComponent(token)}`;
let broken = false;
function load(number) {
  const image = $('image');
  broken = false;
  image.alt = `candidate ${number + 1}`;
  return new Promise(done => {
    image.onload = () => {
      image.classList.toggle('small', Math.max(image.naturalWidth, image.naturalHeight) < 400); done();
    };
    image.onerror = () => { broken = true; image.alt = 'This picture cannot be shown.'; done(); };
    image.src = picture(number);
  });
}
function texts() {  // what waits in the queue is newer than what the server has
  const waitingFor = field => [...queue.values()].filter(e => e.sample === shown.sample && e.reviewer === reviewer && field in e.set)
    .sort((a, b) => b.at - a.at)[0]?.set[field];
  $('caption').value = waitingFor('caption') ?? mine(shown.sample).caption ?? shown.caption;
  $('note').value = waitingFor('note') ?? mine(shown.sample).note ?? '';
  words();
}
function finished() {
  const kept = samples.filter(sample => decided(sample) === 'keep').length;
  const filter = $('filter').value;
  $('image').hidden = true; $('verdict').textContent = ''; shown = null; walk++;
  document.body.dataset.number = 'done';
  $('number').value = '';
  for (const field of ['caption', 'note']) { $(field).value = ''; $(field).disabled = true; }  // a text would be of no picture
  words();
  $('done').hidden = false;
  $('done').textContent = filter === 'undecided'
    ? `All ${samples.length} candidates are decided: ${kept} kept. Choose "all" above to look at them again, or write the shards with action=export.`
    : 'There is no such candidate.';
}
function verdict() {
  if (!shown) return;
  const is = decided(shown.sample);
  $('verdict').className = is || '';
  $('verdict').textContent = is === 'keep' ? 'kept' : is === 'drop' ? 'dropped' : '';
  const others = Object.entries(known.get(shown.sample)?.by || {}).filter(([name, one]) => name !== reviewer && one.decision);
  $('others').textContent = others.map(([name, one]) => `${name}: ${one.decision}`).join(', ');
}
function counts() {
  const all = samples.map(decided), kept = all.filter(is => is === 'keep').length, done = all.filter(Boolean).length;
  $('total').textContent = samples.length;
  $('progress').max = samples.length || 1; $('progress').value = done;
  $('counts').textContent = `${done} of ${samples.length} decided, ${kept} kept`;
}
function words() {
  const count = ($('caption').value.match(/\S+/g) || []).length, [low, high] = settings.words;
  $('words').textContent = `${count} words (${count < low ? 'below ' : count > high ? 'above ' : ''}${low}–${high})`;
  $('words').parentElement.classList.toggle('off', count < low || count > high);
}
function say(text, bad = false) { $('status').textContent = text; $('status').classList.toggle('bad', bad); }
function zoom(on, x = .5, y = .5) {
  const stage = $('stage');
  stage.classList.toggle('zoomed', on);
  if (on) stage.scrollTo((stage.scrollWidth - stage.clientWidth) * x, (stage.scrollHeight - stage.clientHeight) * y);
}

let polling = false;
async function poll() {
  if (polling) return;
  polling = true;
  try {
    const state = await ask(`/api/state?since=${revision}&listing=${listing}`);
    // What is not sent yet lies in local storage, but for a text that is too long.
    if (listing && state.listing !== listing) { if (!tooLong()) location.reload(); return; }
    listing = state.listing;
    revision = Math.max(revision, state.revision);
    for (const [sample, entry] of Object.entries(state.changed)) {
      const before = known.get(sample), text = mine(sample).caption;
      if (before && before.at >= entry.at) continue;
      known.set(sample, entry);
      if (shown?.sample !== sample) continue;
      const theirs = mine(sample).caption;
      if (theirs !== undefined && theirs !== text && theirs !== $('caption').value && !typing.caption) {
        $('caption').value = theirs; words();
        notice('The description was changed in another tab; its text is shown now.');
      } else if (theirs !== undefined && theirs !== text && theirs !== $('caption').value) {
        notice(`Another tab of ${reviewer} had set the description to: ${theirs}\nYours follows; the log keeps both.`, theirs);
      }
      verdict();
    }
    if (state.samples) { samples = state.samples; numbers = new Map(samples.map((sample, number) => [sample, number])); }
    counts();
    if (away && !queue.size) { away = false; say('The server answers again.'); if (shown && broken) load(current); }
    adopt();
    if ([...queue.values()].some(event => event !== typing.caption && event !== typing.note)) flush();
  } catch (error) { unreachable(error); } finally { polling = false; }
}

$('keep').onclick = () => decide('keep');
$('drop').onclick = () => decide('drop');
$('undo').onclick = undo;
$('image').onclick = event => {
  const box = $('image').getBoundingClientRect();
  zoom(!$('stage').classList.contains('zoomed'), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
};
for (const field of ['caption', 'note']) {
  $(field).oninput = () => shown && typed(field);
  $(field).onblur = () => { if (typing[field]) { stopTyping(field); flush(); } };
}
$('filter').onchange = () => { $('filter').blur(); if (!shown || !matches(current)) go(1); };
$('number').onchange = () => { $('number').blur(); jump(Number($('number').value) - 1); };
addEventListener('hashchange', () => jump(Number(location.hash.slice(1)) - 1));
$('reviewer').value = reviewer;
$('reviewer').onchange = async () => {
  const name = $('reviewer').value.trim();
  if (!name || tooLong()) { $('reviewer').value = reviewer; return; }
  await settle();
  reviewer = name;
  try { localStorage.setItem(`${PREFIX}reviewer`, name); } catch { /* no storage */ }
  history_.length = 0; session('undo', '[]');
  counts();
  if (shown) { texts(); verdict(); } else go(1);
};
addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName)) {
    if (event.key === 'Escape' && event.target === $('number') && shown) $('number').value = current + 1;
    if (event.key === 'Escape' || (event.key === 'Enter' && event.target.tagName === 'INPUT')) event.target.blur();
    return;
  }
  const act = {k: () => decide('keep'), d: () => decide('drop'), u: undo, ArrowRight: () => go(1), ArrowLeft: () => go(-1),
    e: () => $('caption').focus(), n: () => $('note').focus(), z: () => zoom(!$('stage').classList.contains('zoomed')),
    g: () => { $('number').focus(); $('number').select(); },
    Escape: () => zoom(false)}[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); if (!event.repeat || event.key.startsWith('Arrow')) act(); }
});
addEventListener('pagehide', () => {  // a last try; what it does not reach lies in local storage
  for (const event of queue.values()) {
    fetch('/api/decision', {method: 'POST', keepalive: true, body: wire(event),
      headers: {'X-Token': token, 'Content-Type': 'application/json'}}).catch(() => {});
  }
});
(async () => {
  $('name').textContent = settings.name;
  while (!samples.length) { await poll(); if (!samples.length) await new Promise(go => setTimeout(go, 500)); }
  adopt();
  const named = Number(location.hash.slice(1)) - 1;
  const first = Number.isInteger(named) && named >= 0 && named < samples.length ? named : next(samples.length - 1);
  if (first >= 0) await show(first); else finished();
  setInterval(poll, 1500);
})();
