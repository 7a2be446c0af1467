// A replacement for Worker on pages opened from disk, where browsers do not start workers: the script
// runs in a hidden frame. The search of the site needs it (mkdocs.yml). Without this file, the theme
// would load such a script from the network.
window.IFrameWorker = class extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.appendChild(this.frame);
    this.waiting = [];
    const inner = this.frame.contentWindow;
    inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
    inner.importScripts = async (...urls) => {
      for (const each of urls) await this.load(each);
    };
    this.load(url).then(() => {
      this.isReady = true;
      for (const data of this.waiting.splice(0)) this.postMessage(data);
    });
  }

  load(url) {
    return new Promise((resolve, reject) => {
      const script = this.frame.contentDocument.createElement("script");
      script.onload = resolve;
      script.onerror = reject;
      script.src = new URL(url, location.href).href;
      this.frame.contentDocument.head.appendChild(script);
    });
  }

  postMessage(data) {
    if (!this.isReady) return this.waiting.push(data);
    this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
  }

  terminate() {
    this.frame.remove();
  }
};
if (location.protocol === "file:") window.Worker = window.IFrameWorker;
