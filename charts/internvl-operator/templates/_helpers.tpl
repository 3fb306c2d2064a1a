{{/*
The release's name if it contains the chart's name, else both joined by a hyphen. A Service's name has at most 63
characters, and those of the chart's Services end with -metrics and -webhook.
*/}}
{{- define "internvl-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 55 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 55 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "internvl-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "internvl-operator.labels" -}}
{{ include "internvl-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "internvl-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "internvl-operator.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | required "serviceAccount.name: found nothing, expected the name of an existing ServiceAccount, because serviceAccount.create is false" -}}
{{- end -}}
{{- end -}}

{{/* The operator's rights in a namespace. It reads no Secret there: pods refer to them by name. */}}
{{- define "internvl-operator.rules" -}}
- apiGroups: [internvl.dev]
  resources: [internvlfinetunes]
  verbs: [list, watch, delete]        # delete: runPolicy.ttlSecondsAfterFinished
- apiGroups: [internvl.dev]
  resources: [internvlfinetunes/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps, services]   # Kubernetes deletes them with their owner
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]              # patch: a repeated event raises the first one's count
{{- if .Values.networkPolicy.enabled }}
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]        # one for each run
  verbs: [get, list, watch, create, patch]
{{- end }}
{{- $groups := dict "volcano" "scheduling.volcano.sh" "coscheduling" "scheduling.x-k8s.io" }}
{{- range .Values.gangSchedulers }}
- apiGroups: [{{ get $groups . }}]
  resources: [podgroups]
  verbs: [get, list, watch, create, patch]
{{- end }}
{{- end -}}

{{/* Who may reach /metrics and /progress of a run's pods: this operator, and Prometheus. */}}
{{- define "internvl-operator.peers" -}}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) -}}
{{- $pods := dict "matchLabels" (include "internvl-operator.selectorLabels" . | fromYaml) -}}
{{- prepend .Values.networkPolicy.prometheus (dict "namespaceSelector" $namespace "podSelector" $pods) | toJson -}}
{{- end -}}

{{- define "internvl-operator.subject" -}}
- kind: ServiceAccount
  name: {{ include "internvl-operator.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
