'use strict';
const $ = selector => document.querySelector(selector), all = selector => [...document.querySelectorAll(selector)];
const thresholds = ['min_score', 'max_overlap', 'top_k'];
let about, file, shown, drawing = false, changed = false, uploads = 0;  // shown: the latest response, with its id

function make(tag, text = '', attributes = {}) {  // text is never parsed as HTML
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

async function request(address, options) {
  let response;
  try { response = await fetch(address, options); } catch { throw new Error('the server cannot be reached'); }
  const answer = await response.json().catch(() => ({error: `the server answered ${response.status}`}));
  if (!response.ok) throw Object.assign(new Error(answer.error), {status: response.status});
  return answer;
}

function query(more = {}) {
  const parameters = new URLSearchParams(more);
  for (const name of thresholds) parameters.set(name, $('#' + name).value);
  for (const one of all('#classes input:not(:checked)')) parameters.append('suppress', one.value);
  return parameters;
}

function refuse(error) {
  $('.refused').textContent = error.message;
  $('.refused').hidden = false;
}

async function upload(newFile) {
  const number = ++uploads;  // of several, the last one is shown
  file = newFile;
  shown = undefined;
  $('.refused').hidden = true;
  document.body.classList.add('busy');
  try {
    if (file.size > about.max_bytes) {
      throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; at most ${about.max_bytes / 1e6} are accepted`);
    }
    const answer = await request('pictures?' + query({name: file.name}), {method: 'POST', body: file});
    if (number !== uploads) return;
    shown = answer;
    $('#preview').src = `pictures/${shown.id}/preview.jpg`;
    $('#preview').width = shown.width;
    $('#preview').height = shown.height;
    show(shown);
    if (changed) redraw();  // a slider moved meanwhile
  } catch (error) {
    if (number !== uploads) return;
    $('#result').hidden = $('#found').hidden = true;
    refuse(error);
  } finally {
    if (number === uploads) document.body.classList.remove('busy');
  }
}

async function redraw() {  // one request at a time, the last one for the last position of the sliders
  changed = true;
  if (!shown || drawing) return;
  drawing = true;
  try {
    while (changed && shown) {
      changed = false;
      const id = shown.id;
      const answer = await request(`pictures/${id}/detections.json?` + query());
      if (shown && shown.id === id) show(Object.assign(shown, answer));
    }
  } catch (error) {
    if (error.status === 404 && file) upload(file); else refuse(error);
  } finally {
    drawing = false;
  }
}

function show(answer) {
  const {objects, width, height} = answer, stem = file.name.replace(/\.[^.]*$/, '');
  const styled = (element, label) => {
    const [red, green, blue] = about.classes[label - 1].colour;
    element.style.setProperty('--c', `rgb(${red} ${green} ${blue})`);
    element.style.setProperty('--t', 0.299 * red + 0.587 * green + 0.114 * blue > 128 ? '#000' : '#fff');
    return element;
  };
  const boxes = objects.map(({name, label, score, box: [left, top, right, bottom]}, index) => {
    const element = styled(make('div', '', {class: left > 0.6 * width ? 'box right' : 'box', 'data-n': index + 1}), label);
    Object.assign(element.style, {left: 100 * left / width + '%', top: 100 * top / height + '%',
      width: 100 * (right - left) / width + '%', height: 100 * (bottom - top) / height + '%'});
    element.append(make('b', `${name} ${score.toFixed(2)}`));
    return {element, area: (right - left) * (bottom - top)};
  });
  $('#boxes').replaceChildren(...boxes.sort((a, b) => b.area - a.area).map(one => one.element));  // small ones on top
  $('tbody').replaceChildren(...objects.map(({name, label, score, box}, index) => {
    const row = styled(make('tr', '', {'data-n': index + 1, tabindex: 0}), label), named = make('td');
    named.append(make('span', '', {class: 'swatch'}), name);
    row.append(make('td', index + 1), named, make('td', score.toFixed(2)), make('td', box.map(Math.round).join(', ')));
    return row;
  }));
  $('#count').textContent = objects.length === 1 ? '1 object' : `${objects.length} objects`;
  $('#status').textContent = `in ${width} x ${height} pixels; reading the picture and running the network took ${answer.seconds.toFixed(2)} s`;
  $('#preview').alt = `the picture, with ${$('#count').textContent}`;
  for (const [id, path, name] of [['json', 'detections.json', '.json'], ['picture', 'annotated.jpg', '_detected.jpg']]) {
    $('#' + id).href = `pictures/${answer.id}/${path}?` + query();
    $('#' + id).download = stem + name;
  }
  $('#result').hidden = false;
  $('#found').hidden = !objects.length;
  const taken = [];  // by labels of better objects; a label that would hide one goes to the bottom of its box
  for (const {element} of boxes.sort((a, b) => a.element.dataset.n - b.element.dataset.n)) {
    const place = () => element.firstChild.getBoundingClientRect();
    const hides = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    element.classList.toggle('low', taken.some(other => hides(place(), other)));
    taken.push(place());
  }
}

function light(event) {  // box and row of one object, under the pointer and under the keyboard's focus
  const one = event.target.closest && event.target.closest('[data-n]');
  const number = one && (event.type === 'mouseover' || event.type === 'focusin') ? one.dataset.n : null;
  all('[data-n]').forEach(element => element.classList.toggle('lit', element.dataset.n === number));
}

async function start() {
  try { about = await request('about.json'); } catch (error) { return refuse(error); }
  $('#model').textContent = about.model;
  for (const name of thresholds) {
    const slider = $('#' + name), value = slider.parentElement.querySelector('output');
    const write = () => { value.textContent = slider.value; };
    slider.value = about[name];
    write();
    slider.addEventListener('input', () => { write(); redraw(); });
  }
  for (const one of about.classes) {
    const label = make('label'), choice = make('input', '', {type: 'checkbox', value: one.name});
    choice.checked = true;
    choice.addEventListener('change', redraw);
    label.append(choice, one.name);
    $('#classes').append(label);
  }
  for (const state of ['all', 'none']) {
    $('#' + state).addEventListener('click', () => {
      all('#classes input').forEach(choice => { choice.checked = state === 'all'; });
      redraw();
    });
  }
  about.examples.forEach((name, number) => {
    const button = make('button', '', {title: name});
    button.append(make('img', '', {src: `examples/${number}`, alt: name}));
    button.addEventListener('click', async () => {
      try { upload(new File([await (await fetch(`examples/${number}`)).blob()], name)); } catch (error) { refuse(error); }
    });
    $('#examples').append(button);
    $('#examples').hidden = false;
  });
  $('#file').addEventListener('change', event => { if (event.target.files[0]) upload(event.target.files[0]); event.target.value = ''; });
  document.addEventListener('paste', event => { if (event.clipboardData.files[0]) upload(event.clipboardData.files[0]); });
  document.addEventListener('dragover', event => { event.preventDefault(); document.body.classList.add('over'); });
  for (const kind of ['dragleave', 'drop']) document.addEventListener(kind, () => document.body.classList.remove('over'));
  document.addEventListener('drop', event => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });
  for (const kind of ['mouseover', 'mouseout', 'focusin', 'focusout']) document.addEventListener(kind, light);
}
start();
