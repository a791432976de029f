// Shows a pair, saves each choice at the server at once, and goes on when all are saved.
//
// The last choice lies in the browser's local storage until the server has acknowledged it, so that a reload while the server
// is away does not lose it. Pictures are shown together, once both are there.
'use strict';
const $ = id => document.getElementById(id);
const settings = JSON.parse($('settings').textContent);
const token = new URLSearchParams(location.search).get('token') || '';
const PENDING = `votes:${settings.id}:pending`;
const SIDES = ['left', 'tie', 'right'], ZOOM = 3;
const pictures = new Map();  // name -> promise of an object URL
let task = null, active = 0, busy = false, started = 0, spent = 0, stamp = 0, commentTimer = null;
const later = new Set();

const pause = ms => new Promise(go => setTimeout(go, ms));
function say(text, kind = '') { $('status').textContent = text; $('status').className = kind; }
function storage(value) {
  try {
    if (value === undefined) return JSON.parse(localStorage.getItem(PENDING) || 'null');
    if (value === null) localStorage.removeItem(PENDING); else localStorage.setItem(PENDING, JSON.stringify(value));
  } catch { /* a browser that stores nothing: what is not acknowledged is lost at a reload */ }
  return null;
}
async function once(path, body) {
  const control = new AbortController(), timer = setTimeout(() => control.abort(), 20000);
  try {
    const answer = await fetch(path, {method: body ? 'POST' : 'GET', body: body && JSON.stringify(body), cache: 'no-store',
      signal: control.signal, headers: {'X-Token': token, ...(body ? {'Content-Type': 'application/json'} : {})}});
    if (answer.ok) return body ? await answer.json() : await answer.blob();
    const reason = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(reason.error || answer.statusText), {status: answer.status});
  } finally { clearTimeout(timer); }
}
async function ask(path, body) {  // until it is answered; what is refused for good is thrown
  for (let wait = 300; ; wait = Math.min(wait * 1.6, 4000)) {
    try { return await once(path, body); } catch (error) {
      if (error.status && error.status !== 429 && error.status < 500) throw error;
      say(error.status && error.status !== 429 ? `Not saved: ${error.message}. Tell whoever runs this; it is tried again.`
        : 'The server does not answer. Your choice is kept and sent again.', 'bad');
      await pause(wait);
    }
  }
}

function picture(name) {
  if (!pictures.has(name)) {
    pictures.set(name, ask(`/picture/${name}`).then(blob => URL.createObjectURL(blob)));
    pictures.get(name).catch(() => {});
  }
  return pictures.get(name);
}
function forgetPictures(keep) {
  for (const [name, url] of pictures) if (!keep.includes(name)) {
    pictures.delete(name);
    url.then(URL.revokeObjectURL).catch(() => {});
  }
}
async function put(side, name) {
  const image = $(side).querySelector('img');
  image.removeAttribute('src');
  image.src = await picture(name);
  await image.decode();
}

// Time runs while the page is looked at.
function clock() { if (!document.hidden && !started) started = performance.now(); }
function seconds() { return (spent + (started ? performance.now() - started : 0)) / 1000; }
function restart() { spent = 0; started = 0; clock(); }
document.addEventListener('visibilitychange', () => {
  if (document.hidden) { if (started) spent += performance.now() - started; started = 0; } else clock();
});

async function show(state) {
  setBusy(true);
  task = state.task || null;
  $('progress').max = state.total || 1; $('progress').value = state.done;
  $('counts').textContent = `${state.done} of ${state.total}` + (state.rounds > 1 && task ? `, part ${state.round} of ${state.rounds}` : '');
  $('back').disabled = !state.done;
  $('later').hidden = true;
  for (const part of ['prompt', 'left', 'right', 'questions', 'comment', 'next', 'keys']) $(part).hidden = !task;
  $('done').hidden = !!task;
  zoom(false);
  if (!task) {
    forgetPictures([]);
    $('done').textContent = state.later ? `${state.later} pairs were passed over, since a picture could not be shown. Reload this page to try them again.`
      : 'All done. Thank you! You can close this page, or go back to the last pair.';
    document.body.dataset.task = state.later ? 'later' : 'done';
    setBusy(false);
    return;
  }
  stamp = Math.max(stamp, task.stamp);
  document.body.classList.toggle('textless', task.text === null);
  $('text').textContent = task.text ?? '';
  $('prompt').scrollTop = 0;
  $('comment').value = task.comment;
  questions();
  forgetPictures([task.left, task.right, ...state.next]);
  document.body.classList.add('waiting');
  try { await Promise.all([put('left', task.left), put('right', task.right)]); } catch (error) {
    say(`A picture cannot be shown (${error.message}). Pass this pair over, and tell whoever runs this.`, 'bad');
    $('later').hidden = false;
    document.body.dataset.task = 'broken';
    return;
  }
  document.body.classList.remove('waiting');
  setBusy(false);
  restart();
  document.body.dataset.task = task.name;
  document.body.dataset.done = state.done;
  for (const name of state.next) picture(name);
}
function setBusy(on) { busy = on; document.body.ariaBusy = on; buttons(); }

function questions() {
  $('questions').replaceChildren(...task.questions.map((question, number) => {
    const row = document.createElement('div'), text = document.createElement('b'), choices = document.createElement('div');
    row.className = 'question'; choices.className = 'choices'; choices.role = 'group'; choices.ariaLabel = question.text;
    text.textContent = question.text;
    for (const side of SIDES) {
      const button = document.createElement('button'), key = document.createElement('kbd');
      key.textContent = {left: 'A', tie: 'T', right: 'L'}[side];
      button.append(`${side} `, key);
      button.dataset.side = side;
      button.onclick = () => { if (!busy) { active = number; choose(side); } };
      choices.append(button);
    }
    row.onclick = () => { active = number; buttons(); };
    row.append(text, choices);
    return row;
  }));
  activate();
}
function activate() {
  const open = task.questions.findIndex(question => !task.choices[question.name]);
  active = open >= 0 ? open : task.questions.length - 1;
}
function buttons() {
  if (!task) return;
  const asked = task.questions[active];
  [...$('questions').children].forEach((row, number) => {
    row.classList.toggle('active', number === active);
    for (const button of row.querySelectorAll('button')) {
      button.ariaPressed = task.choices[task.questions[number].name] === button.dataset.side;
      // The second question opens once the first is answered.
      button.disabled = busy || task.questions.slice(0, number).some(question => !task.choices[question.name]);
    }
  });
  for (const side of ['left', 'right']) $(side).classList.toggle('chosen', task.choices[asked.name] === side);
  document.body.classList.toggle('dimmed', task.text !== null && !asked.shows_text);
  $('next').disabled = busy || task.questions.some(question => !task.choices[question.name]);
}

async function choose(side) {
  if (busy || !task) return;
  const question = task.questions[active].name;
  const first = !task.choices[question];
  stamp = Math.max(Date.now(), stamp + 1);
  const vote = {task: task.name, question, choice: side, stamp, seconds: seconds()};
  storage(vote);
  task.choices[question] = side;  // shown at once; "next" waits until it is saved
  setBusy(true);
  say('…');
  await send(vote);
  if (task?.name !== vote.task) return;
  if (first) { activate(); if (active && task.questions[active].name !== question) restart(); }
  setBusy(false);
}
async function send(vote) {
  try {
    const answer = await ask('/api/vote', vote);
    storage(null);
    if (task?.name === vote.task) { task.choices = answer.choices; stamp = Math.max(stamp, answer.stamp); }
    say('saved', 'good');
  } catch (error) {
    storage(null);
    if ([403, 415].includes(error.status)) return say(`Not saved: ${error.message}.`, 'bad');
    await show(await ask('/api/state', {later: [...later]}));  // another tab went on meanwhile
    say(`Not saved: ${error.message}.`, 'bad');
  }
}
async function saveComment() {
  clearTimeout(commentTimer); commentTimer = null;
  if (!task || $('comment').value.trim() === task.comment) return;
  task.comment = $('comment').value.trim();
  await ask('/api/comment', {task: task.name, text: task.comment}).then(() => say('saved', 'good'))
    .catch(error => say(`Not saved: ${error.message}.`, 'bad'));
}
async function go(path, body) {
  if (busy) return;
  setBusy(true);
  try {
    await saveComment();
    const state = await ask(path, {...body, later: [...later]});
    say('');
    await show(state);
  } catch (error) {
    await show(await ask('/api/state', {later: [...later]}));
    say(`${error.message}.`, 'bad');
  }
}
const next = () => { if (task && !$('next').disabled) go('/api/next', {task: task.name}); };
const back = () => { if (!$('back').disabled) go('/api/back', {}); };
$('next').onclick = next;
$('back').onclick = back;
$('later').onclick = () => { later.add(task.name); busy = false; document.body.classList.remove('waiting'); go('/api/state', {}); };
$('comment').oninput = () => { clearTimeout(commentTimer); commentTimer = setTimeout(saveComment, 600); };
$('comment').onblur = saveComment;

// Both pictures are enlarged at the same place of each, which follows the pointer.
let zoomed = false, place = [50, 50];
function zoom(on, x = 50, y = 50) {
  zoomed = on; place = [x, y];
  for (const frame of document.querySelectorAll('.frame')) {
    frame.classList.toggle('zoomed', on);
    const image = frame.firstElementChild;
    image.style.transformOrigin = `${x}% ${y}%`;
    image.style.transform = on ? `scale(${ZOOM})` : '';
  }
}
function under(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const within = (value, size) => Math.min(100, Math.max(0, 100 * value / size));
  return [within(event.clientX - box.left, box.width), within(event.clientY - box.top, box.height)];
}
for (const frame of document.querySelectorAll('.frame')) {
  frame.onclick = event => zoom(!zoomed, ...under(event));
  frame.onpointermove = event => { if (zoomed) zoom(true, ...under(event)); };
}
function walk(x, y) { zoom(true, Math.min(100, Math.max(0, place[0] + x)), Math.min(100, Math.max(0, place[1] + y))); }

addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.tagName === 'TEXTAREA') { if (event.key === 'Escape') event.target.blur(); return; }
  const press = event.target.tagName === 'BUTTON' && event.key === 'Enter';
  if (press && event.target.ariaPressed !== 'true') return;  // Enter presses the button that has the focus
  const acts = {a: () => choose('left'), l: () => choose('right'), t: () => choose('tie'), u: back, Enter: next,
    z: () => zoom(!zoomed, ...place), Escape: () => zoom(false), c: () => $('comment').focus()};
  const arrows = zoomed ? {ArrowLeft: () => walk(-10, 0), ArrowRight: () => walk(10, 0), ArrowUp: () => walk(0, -10), ArrowDown: () => walk(0, 10)}
    : {ArrowLeft: acts.a, ArrowRight: acts.l, ArrowDown: acts.t};
  if (!zoomed && event.key === 'ArrowDown' && document.activeElement === $('prompt')) return;  // which scrolls
  const act = {...acts, ...arrows}[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); if (!event.repeat || zoomed) act(); }
});
(async () => {
  $('title').textContent = settings.title;
  $('rater').textContent = settings.rater;
  const pending = storage();
  try {
    let said = ['saved', 'good'];
    if (pending) await ask('/api/vote', pending).catch(error => { said = [`Not saved: ${error.message}.`, 'bad']; }).finally(() => storage(null));
    await show(await ask('/api/state', {}));
    if (pending) say(...said);
  } catch (error) { say(`${error.message}.`, 'bad'); }
})();
