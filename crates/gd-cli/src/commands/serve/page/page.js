// The chat page of gd serve: sends the chat, shows the answer as it is written, and for a chosen word where it was read from.
'use strict';
const byId = (id) => document.getElementById(id);
const chat = [];
let answering = null;
let hasSources = true;

const make = (tag, name, text) => {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
};

function headers() {
  const key = byId('key').value;
  return { 'Content-Type': 'application/json', ...(key && { Authorization: 'Bearer ' + key }) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return 'status ' + response.status;
  }
}

// The data of the events of a response, one after the other.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith('data: ') && line !== 'data: [DONE]') yield JSON.parse(line.slice(6));
    }
  }
}

function body() {
  const system = byId('system').value;
  const messages = [...(system ? [{ role: 'system', content: system }] : []), ...chat];
  const body = { messages, stream: true };
  if (hasSources) body.sources = true;
  if (byId('temperature').value !== '') body.temperature = Number(byId('temperature').value);
  if (byId('max').value !== '') body.max_tokens = Number(byId('max').value);
  return body;
}

// Sends the chat. A model without selecting layers refuses to name sources, and is asked without.
async function request(signal) {
  const send = () =>
    fetch('v1/chat/completions', { method: 'POST', headers: headers(), body: JSON.stringify(body()), signal });
  let response = await send();
  if (response.status === 400 && hasSources) {
    const { error } = await response.clone().json();
    if (error.param === 'sources') {
      hasSources = false;
      response = await send();
    }
  }
  return response;
}

async function answer() {
  const view = make('div', 'message assistant', '');
  byId('chat').append(view);
  answering = new AbortController();
  byId('send').hidden = true;
  byId('stop').hidden = false;
  let text = '';
  const tokens = [];
  try {
    const response = await request(answering.signal);
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      tokens.push(...(choice.gd?.prompt ?? []));
      for (const token of choice.gd?.tokens ?? []) {
        tokens.push(token);
        view.append(word(tokens, tokens.length - 1));
      }
      const part = choice.delta.content ?? '';
      text += part;
      if (!choice.gd) view.append(part);
      window.scrollTo(0, document.body.scrollHeight);
    }
  } catch (error) {
    if (error.name !== 'AbortError') byId('chat').append(make('div', 'message error', error.message));
  }
  chat.push({ role: 'assistant', content: text });
  answering = null;
  byId('send').hidden = false;
  byId('stop').hidden = true;
}

// A token that shows its sources when it is chosen.
function word(tokens, at) {
  const element = make('button', 'token', tokens[at].text);
  element.type = 'button';
  element.addEventListener('click', () => showSources(tokens, at, element));
  return element;
}

function showSources(tokens, at, element) {
  document.querySelectorAll('.chosen').forEach((other) => other.classList.remove('chosen'));
  element.classList.add('chosen');
  const sources = tokens[at].sources;
  const read = new Set(sources.map((source) => source.position));
  const abstained = sources.filter((source) => source.position === null).length;
  byId('about').textContent =
    `${JSON.stringify(tokens[at].text)} was predicted from ${read.size - (abstained > 0 ? 1 : 0)} positions by ` +
    `${sources.length} heads, of which ${abstained} abstained.`;
  const shown = tokens.slice(0, at).map((token, position) =>
    make('span', read.has(position) ? 'token read' : 'token', token.text));
  byId('context').replaceChildren(...shown);
  const row = (source) => {
    const line = document.createElement('tr');
    const text = source.position === null ? '' : tokens[source.position].text;
    const margin = source.margin === null ? '∞' : source.margin.toPrecision(3);
    for (const cell of [source.layer, source.head, source.position ?? 'none', text, margin]) {
      line.append(make('td', '', String(cell)));
    }
    return line;
  };
  byId('rows').replaceChildren(...sources.map(row));
  byId('sources').hidden = false;
}

byId('form').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = byId('text').value;
  if (answering || !text.trim()) return;
  byId('text').value = '';
  chat.push({ role: 'user', content: text });
  byId('chat').append(make('div', 'message user', text));
  answer();
});
byId('text').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId('form').requestSubmit();
  }
});
byId('stop').addEventListener('click', () => answering?.abort());
byId('reset').addEventListener('click', () => {
  answering?.abort();
  chat.length = 0;
  byId('chat').replaceChildren();
  byId('sources').hidden = true;
});
// The name of the model, which a server with a key tells only with it.
function showModel() {
  fetch('v1/models', { headers: headers() })
    .then((response) => (response.ok ? response.json() : null))
    .then((models) => { if (models) byId('model').textContent = models.data[0].id; })
    .catch(() => {});
}
byId('key').addEventListener('change', showModel);
showModel();
